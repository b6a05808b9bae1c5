"""OC20's files of every age, and what is refused."""

import gc
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from oc20_files import (
    FIXTURES,
    assert_same,
    dumps_pyg1,
    is2re_fields,
    s2ef_fields,
    structure,
    write_lmdb,
)
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb


def test_genuine_oc20_file(val_20: Path) -> None:
    dataset = OC20Lmdb(val_20, energy_kind="adsorption")
    assert len(dataset) == 20
    first = dataset[0]
    # Numbers as stored in the file, read with pickletools.
    assert first.energy.item() == pytest.approx(3.4314369849999906, rel=1e-6)
    assert (first.natoms, first.sid, first.fid) == (33, "1981709", 0)
    assert first.pos.shape == first.forces.shape == (33, 3)
    assert first.cell.shape == (1, 3, 3)
    assert first.pbc.tolist() == [[True] * 3]
    assert first.atomic_numbers.dtype == first.tags.dtype == torch.int64
    assert first.fixed.dtype == torch.bool
    assert torch.equal(first.tags == 0, first.fixed)
    assert "edge_index" not in first
    assert [dataset[index].fid for index in range(20)] == list(range(20))
    batch = Batch.from_data_list([dataset[0], dataset[1]])
    assert batch.cell.shape == (2, 3, 3)
    assert batch.natoms.tolist() == [33, 33]
    assert batch.energy.shape == (2,)
    assert batch.sid == ["1981709", "1981709"]


@pytest.mark.parametrize("age", ["pyg1", "pyg2", "numpy"])
@pytest.mark.parametrize("length", [None, pickle.dumps(2, protocol=2), b"2"])
def test_s2ef_records_of_every_age(tmp_path: Path, age: str, length: bytes | None) -> None:
    records = [s2ef_fields(5, 0), s2ef_fields(6, 1)]
    if age == "numpy":
        arrays = [{k: v.numpy() if torch.is_tensor(v) else v for k, v in r.items()} for r in records]
        values = [pickle.dumps(Data(**record), protocol=5) for record in arrays]
        records[0]["y"] = np.float64(records[0]["y"])
    elif age == "pyg2":
        values = [pickle.dumps(Data(**record), protocol=4) for record in records]
    else:
        values = [dumps_pyg1(record) for record in records]
    dataset = OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", values, length))
    assert len(dataset) == 2
    assert dataset.natoms.tolist() == [5, 6]
    for data, record in zip(dataset, records, strict=True):
        assert torch.equal(data.pos, record["pos"])
        assert torch.equal(data.forces, record["force"])
        assert torch.equal(data.atomic_numbers, record["atomic_numbers"].long())
        assert torch.equal(data.fixed, record["fixed"].bool())
        assert data.energy.tolist() == [record["y"]]
        assert (data.sid, data.fid) == ("1234", int(record["fid"]))


@pytest.mark.parametrize("dumps", [dumps_pyg1, lambda fields: pickle.dumps(Data(**fields), protocol=4)])
def test_is2re_records(tmp_path: Path, dumps) -> None:
    record = is2re_fields()
    data = OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", [dumps(record)]))[0]
    assert data.energy.tolist() == [-0.75] == data.y_relaxed.tolist()
    assert data.y_init.tolist() == [3.5]
    assert torch.equal(data.pos_relaxed, record["pos_relaxed"])
    assert "forces" not in data
    assert (data.sid, data.fid) == ("77", 0)


def test_records_without_targets(tmp_path: Path) -> None:
    fields = s2ef_fields()
    del fields["y"], fields["force"]
    data = OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1(fields)]))[0]
    assert "energy" not in data
    assert "forces" not in data


def test_strided_tensors_and_shared_storages(tmp_path: Path) -> None:
    fields = s2ef_fields(4)
    wide = torch.arange(40.0).reshape(4, 10)
    fields["pos"], fields["force"] = wide[:, 1:4], wide.T[4:7].T
    data = OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1(fields)]))[0]
    assert torch.equal(data.pos, wide[:, 1:4])
    assert torch.equal(data.forces, wide[:, 4:7])


def test_folder_of_shards_in_name_order(tmp_path: Path) -> None:
    for name, numbers in (("b.lmdb", [3, 4]), ("a.lmdb", [0, 1, 2])):
        with LmdbWriter(tmp_path / name, "total") as writer:
            for number in numbers:
                writer.write(structure(natoms=number + 1, seed=number))
    (tmp_path / "notes.txt").write_text("not a shard")
    dataset = OC20Lmdb(tmp_path)
    assert [data.fid for data in dataset] == [0, 1, 2, 3, 4]
    assert dataset[-1].fid == 4
    assert dataset.natoms.tolist() == [1, 2, 3, 4, 5]
    assert dataset.energy_kind == "total"
    assert dataset.describe(3) == f"{tmp_path / 'b.lmdb'}, key 0"
    listed = OC20Lmdb([tmp_path / "b.lmdb", str(tmp_path / "a.lmdb")])
    assert [data.fid for data in listed] == [3, 4, 0, 1, 2]
    with pytest.raises(IndexError):
        dataset[5]
    with pytest.raises(IndexError):
        dataset[-6]


def test_workers_pickles_and_two_readers_of_one_file(val_20: Path) -> None:
    dataset = OC20Lmdb(val_20)
    second = OC20Lmdb(val_20)
    expected = dataset[7]
    assert_same(second[7], expected)
    assert_same(pickle.loads(pickle.dumps(dataset))[7], expected)
    assert len(pickle.dumps(dataset)) < 2000
    loader = DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=list, multiprocessing_context="fork")
    read = [data for batch in loader for data in batch]
    assert [data.fid for data in read] == list(range(20))
    assert_same(dataset[7], expected)  # the children closed their own maps, not ours


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    for energy in (1.0, 2.0):
        with LmdbWriter(path, "adsorption") as writer:
            writer.write(structure(energy=energy))
        dataset = OC20Lmdb(path)
        assert dataset[0].energy.item() == energy


def test_natoms_index_is_kept_and_noticed_when_stale(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1(s2ef_fields(n)) for n in (3, 5)])
    index = tmp_path / "a.lmdb.natoms.npz"
    assert OC20Lmdb(path).natoms.tolist() == [3, 5]
    assert index.exists()
    identity = np.load(index)["identity"]
    np.savez(index, natoms=[7, 7], identity=identity)
    assert OC20Lmdb(path).natoms.tolist() == [7, 7]  # it is the index that is read
    for stale in ({"natoms": [7, 7], "identity": identity + 1}, {"natoms": [7], "identity": identity}):
        np.savez(index, **stale)
        assert OC20Lmdb(path).natoms.tolist() == [3, 5]
    whole = index.read_bytes()
    for damaged in (b"damaged", b"", whole[:50], whole[: len(whole) // 2]):
        index.write_bytes(damaged)
        assert OC20Lmdb(path).natoms.tolist() == [3, 5]
        assert index.read_bytes() == whole


def test_energy_kind_is_declared_or_given_never_contradicted(tmp_path: Path, val_20: Path) -> None:
    with LmdbWriter(tmp_path / "total.lmdb", "total") as writer:
        writer.write(structure())
    assert OC20Lmdb(val_20).energy_kind is None
    assert OC20Lmdb(val_20, "adsorption").energy_kind == "adsorption"
    with pytest.raises(DataError, match=r"total\.lmdb: .*total.*adsorption"):
        OC20Lmdb(tmp_path / "total.lmdb", "adsorption")
    with pytest.raises(DataError, match="energy_kind is 'formation'"):
        OC20Lmdb(val_20, "formation")
    with LmdbWriter(tmp_path / "zadsorption.lmdb", "adsorption") as writer:
        writer.write(structure())
    with pytest.raises(DataError, match="mix adsorption and total"):
        OC20Lmdb([tmp_path / "total.lmdb", tmp_path / "zadsorption.lmdb"])


def test_missing_empty_foreign_and_truncated_files(tmp_path: Path, val_20: Path) -> None:
    with pytest.raises(DataError, match=r"none\.lmdb: no such file"):
        OC20Lmdb(tmp_path / "none.lmdb")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder: the folder holds no \*\.lmdb"):
        OC20Lmdb(tmp_path / "folder")
    bad = tmp_path / "bad.lmdb"
    bad.write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.lmdb: the file is empty"):
        OC20Lmdb(bad)
    bad.write_bytes(b"not a database" * 1000)
    with pytest.raises(DataError, match=r"bad\.lmdb: not an LMDB file"):
        OC20Lmdb(bad)
    whole = val_20.read_bytes()
    for size in (20, 100, 4096, 4200, 8192, 300_000, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"bad\.lmdb: .*(truncated|not an LMDB|header is damaged)"):
            OC20Lmdb(bad)
    with pytest.raises(DataError, match="the dataset has no records"):
        OC20Lmdb(write_lmdb(tmp_path / "none.lmdb", [], pickle.dumps(0)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "not an OC20 record"),
        (b"hello", "not an OC20 record"),
        (pickle.dumps({"pos": 1}, 4), "the value is a dict, not an OC20 record"),
        (pickle.dumps(3, 4), "the value is a int, not an OC20 record"),
        (dumps_pyg1(s2ef_fields())[:-300], "not a readable pickle"),
        (b"EOC1\x10", "damaged"),
        (b"EOC1" + struct.pack("<II", zlib.crc32(b"\x02\0\0\0{}"), 2) + b"{}", "damaged"),
    ],
)
def test_values_that_are_not_records(tmp_path: Path, value: bytes, message: str) -> None:
    dataset = OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1(s2ef_fields()), value]))
    dataset[0]
    with pytest.raises(DataError, match=rf"a\.lmdb, key 1: .*{message}"):
        dataset[1]
    with pytest.raises(DataError, match=r"a\.lmdb, key 1: "):
        _ = dataset.natoms


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos": torch.full((5, 3), float("nan"))}, r"pos holds NaN or infinite values \(atom 0\)"),
        ({"force": torch.full((5, 3), float("inf"))}, "forces holds NaN"),
        ({"y": float("nan")}, "energy holds NaN"),
        ({"y": -2e9}, "energy is -2e\\+09 eV, which no structure has"),
        ({"y": 3e30}, "energy is 3e\\+30 eV, which no structure has"),
        (
            {"force": torch.eye(5, 3) * torch.tensor([1.0, 1.0, -2e4])},
            "the force on atom 2 is .*-20000.0] eV/Å",
        ),
        ({"atomic_numbers": torch.tensor([1.0, 2, 3, 0, 5])}, "atom 3 has atomic number 0"),
        ({"atomic_numbers": torch.tensor([1.0, 2, 300, 4, 5])}, "atom 2 has atomic number 300"),
        ({"tags": torch.tensor([0, 1, 2, 3, 0])}, "atom 3 has tag 3"),
        ({"tags": None}, "no tags"),
        ({"fixed": None}, "no fixed"),
        ({"pos": None}, "no pos"),
        ({"force": torch.zeros(4, 3)}, r"forces has shape \[4, 3\], expected \[5, 3\]"),
        ({"cell": torch.zeros(1, 3, 3)}, "cell has no volume"),
        ({"fid": "last"}, "fid is 'last'"),
    ],
)
def test_impossible_records(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1({**s2ef_fields(), **changes})])
    with pytest.raises(DataError, match=rf"a\.lmdb, key 0: .*{message}"):
        OC20Lmdb(path)[0]


def test_large_values_that_calculations_give(tmp_path: Path) -> None:
    # All electrons of 200 atoms of gold; nuclei on top of each other in a rattled frame.
    changes = {"y": -1.1e8, "force": torch.full((5, 3), 900.0)}
    data = OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1({**s2ef_fields(), **changes})]))[0]
    assert data.energy.item() == pytest.approx(-1.1e8)
    assert (data.forces == 900.0).all()


def test_a_file_named_twice(tmp_path: Path) -> None:
    names = [write_lmdb(tmp_path / name, [dumps_pyg1(s2ef_fields())]) for name in ("a.lmdb", "b.lmdb")]
    (tmp_path / "link.lmdb").symlink_to("a.lmdb")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.lmdb").write_bytes(Path(names[0]).read_bytes())
    for paths in ([names[0], names[1], names[0]], [tmp_path], [tmp_path / "link.lmdb", tmp_path / "a.lmdb"]):
        with pytest.raises(DataError, match=r"(a|link)\.lmdb: .*twice"):
            OC20Lmdb(paths)
    assert len(OC20Lmdb([names[0], tmp_path / "elsewhere"])) == 2


def test_missing_key(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", [dumps_pyg1(s2ef_fields())] * 3, pickle.dumps(3))
    with lmdb.open(str(path), subdir=False, lock=False) as file, file.begin(write=True) as transaction:
        transaction.delete(b"2")
        transaction.put(b"7", b"")
    with pytest.raises(DataError, match=r"a\.lmdb, key 2: .*no such record"):
        OC20Lmdb(path)[2]


def test_files_are_closed_with_the_last_dataset(val_20: Path) -> None:
    def handles() -> int:
        return sum(
            os.readlink(link) == str(val_20) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
        )

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    dataset = OC20Lmdb(val_20)
    dataset[0]
    assert handles() > 0
    del dataset
    gc.collect()
    assert handles() == 0


def test_records_behind_the_length_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = [dumps_pyg1(s2ef_fields(5, fid)) for fid in range(3)]
    assert len(OC20Lmdb(write_lmdb(tmp_path / "whole.lmdb", values, b"3"))) == 3
    assert not caplog.text
    assert len(OC20Lmdb(write_lmdb(tmp_path / "a.lmdb", values, b"2"))) == 2
    assert "says 2 records, and those behind them (from key 2 on) are not read" in caplog.text


def test_a_length_beyond_the_records_is_refused(tmp_path: Path) -> None:
    values = [dumps_pyg1(s2ef_fields(5, 0))]
    path = write_lmdb(tmp_path / "a.lmdb", values, pickle.dumps(10**30, protocol=2))
    with pytest.raises(DataError, match=r"a\.lmdb: .*length.* 10+ .* 1 "):
        OC20Lmdb(path)


def test_files_of_float32_records_are_read() -> None:
    """A file that the version before float64 has written, and what that version read from it."""
    dataset = OC20Lmdb(FIXTURES / "float32_records.lmdb")
    expected = json.loads((FIXTURES / "float32_records.json").read_text())
    assert (dataset.energy_kind, len(dataset)) == ("total", len(expected))
    for data, known in zip(dataset, expected, strict=True):
        assert set(data.keys()) == set(known)
        for name, value in data.to_dict().items():
            assert (value.tolist() if torch.is_tensor(value) else value) == known[name], name
        assert data.pos.dtype == data.cell.dtype == data.energy.dtype == torch.float64
    assert dataset[0].forces.dtype == dataset[0].stress.dtype == torch.float32


@pytest.mark.parametrize("energy", [-523456.789012345, -6e6 - 1e-6, 1e-12])
def test_energies_positions_and_cells_keep_their_digits(tmp_path: Path, energy: float) -> None:
    pos = np.array([[1e4 + 1e-9, 0.1, 0.2], [1 / 3, 2 / 3, 4.0]])
    fields = structure(natoms=2).to_dict() | {"pos": pos, "cell": np.eye(3)[None] * (20 + 1e-13)}
    fields |= {"energy": energy, "y_init": energy, "y_relaxed": energy, "pos_relaxed": pos + 1e-9}
    with LmdbWriter(tmp_path / "a.lmdb", "total") as writer:
        writer.write(Data(**fields))
    data = OC20Lmdb(tmp_path / "a.lmdb")[0]
    assert data.energy.item() == data.y_init.item() == data.y_relaxed.item() == energy
    assert np.array_equal(data.pos.numpy(), pos)
    assert np.array_equal(data.pos_relaxed.numpy(), pos + 1e-9)
    assert np.array_equal(data.cell.numpy(), fields["cell"])


def test_the_packed_test_file_holds_the_original_records() -> None:
    original, packed = OC20Lmdb(FIXTURES / "s2ef_val_20.lmdb"), OC20Lmdb(FIXTURES / "s2ef_val_20_packed.lmdb")
    assert (packed.energy_kind, len(packed)) == (original.energy_kind, len(original))
    for index in (0, 7, 19):
        assert_same(packed[index], original[index])

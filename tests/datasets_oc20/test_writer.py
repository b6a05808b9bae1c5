"""Our LMDB files: exact, whole or absent, and free of pickles."""

import struct
import zlib
from pathlib import Path

import lmdb
import orjson
import pytest
import torch
from oc20_files import assert_same, structure
from torch_geometric.data import Data

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb, structure_record
from datasets_oc20.structure_record import PackedRecord
from tests.disk import full_disk


def test_round_trip_is_exact(tmp_path: Path, val_20: Path) -> None:
    foreign = OC20Lmdb(val_20, "adsorption")
    with LmdbWriter(tmp_path / "out.lmdb", foreign.energy_kind, {"source": "val_20"}) as writer:
        for data in foreign:
            writer.write(data)
    ours = OC20Lmdb(tmp_path / "out.lmdb")
    assert ours.energy_kind == "adsorption"
    assert len(ours) == 20
    for one, other in zip(ours, foreign, strict=True):
        assert_same(one, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.lmdb", "val_20.lmdb"]
    assert (tmp_path / "out.lmdb").stat().st_size < val_20.stat().st_size / 7  # no stored edges


@pytest.mark.parametrize("dropped", [(), ("energy",), ("forces",), ("energy", "forces")])
def test_optional_fields(tmp_path: Path, dropped: tuple[str, ...]) -> None:
    data = structure(pos_relaxed=torch.rand(4, 3).double(), y_relaxed=torch.tensor([1.5]).double())
    data.pbc = torch.tensor([[True, True, False]])
    for name in dropped:
        del data[name]
    with LmdbWriter(tmp_path / "out.lmdb", None) as writer:
        writer.write(data)
    dataset = OC20Lmdb(tmp_path / "out.lmdb")
    assert_same(dataset[0], data)
    assert dataset.energy_kind is None


def test_keys_are_as_documented(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "out.lmdb", "total", {"source": "made up"}) as writer:
        for seed in range(3):
            writer.write(structure(natoms=seed + 1, seed=seed))
    with (
        lmdb.open(str(tmp_path / "out.lmdb"), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        content = dict(transaction.cursor())
    assert sorted(content) == [b"0", b"1", b"2", b"length", b"metadata", b"natoms"]
    assert content[b"length"] == b"3"
    metadata = orjson.loads(content[b"metadata"])
    assert metadata["energy_kind"] == "total"
    assert metadata["format_version"] == 2
    assert metadata["units"]["forces"] == "eV/Å"
    assert metadata["provenance"] == {"source": "made up"}
    assert all(content[key].startswith(b"EOC1") for key in (b"0", b"1", b"2"))
    assert OC20Lmdb(tmp_path / "out.lmdb").natoms.tolist() == [1, 2, 3]
    assert not (tmp_path / "out.lmdb.natoms.npz").exists()


def test_files_beyond_the_first_map(tmp_path: Path) -> None:
    large = structure(natoms=250_000)
    value = structure_record.pack(large)
    with LmdbWriter(tmp_path / "out.lmdb", "total") as writer:
        for _ in range(8):
            writer.write_packed(value, 250_000)
    assert (tmp_path / "out.lmdb").stat().st_size > 1 << 26  # bytes of the first map
    dataset = OC20Lmdb(tmp_path / "out.lmdb")
    assert len(dataset) == 8
    assert_same(dataset[7], large)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.lmdb"
    with LmdbWriter(path, "total") as writer:
        writer.write(structure(energy=7.0))

    def write_two_of_which_one_is_bad() -> None:
        with LmdbWriter(path, "total") as writer:
            writer.write(structure(energy=8.0))
            writer.write(structure(pos=torch.full((4, 3), float("nan"))))

    with pytest.raises(DataError, match=r"out\.lmdb, record 1: pos holds NaN"):
        write_two_of_which_one_is_bad()
    with pytest.raises(DataError, match="no record to write"), LmdbWriter(path, "total"):
        pass
    assert OC20Lmdb(path)[0].energy.item() == 7.0
    assert [item.name for item in tmp_path.iterdir()] == ["out.lmdb"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with LmdbWriter(tmp_path / "out.lmdb", "total") as writer:
            for _ in range(600):
                writer.write(structure(natoms=30))

    with full_disk(200_000), pytest.raises(OSError, match=r"out\.lmdb: cannot be written"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_impossible_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such folder"):
        LmdbWriter(tmp_path / "absent" / "out.lmdb", "total")
    with pytest.raises(DataError, match="is a folder"):
        LmdbWriter(tmp_path, "total")
    with pytest.raises(DataError, match="energy_kind is 'free'"):
        LmdbWriter(tmp_path / "out.lmdb", "free")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.lmdb"
    with LmdbWriter(path, "total") as writer:
        writer.write(structure())
    with (
        lmdb.open(str(path), subdir=False, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        metadata = orjson.loads(transaction.get(b"metadata"))
        transaction.put(b"metadata", orjson.dumps(metadata | {"format_version": 3}))
    with pytest.raises(DataError, match=r"out\.lmdb: .*format 3.*up to 2"):
        OC20Lmdb(path)


@pytest.mark.parametrize("cut", [1, 7, 9, 60, -1, -200])
def test_damaged_records_are_errors(cut: int) -> None:
    value = structure_record.pack(structure(natoms=9))
    with pytest.raises(DataError, match="here: "):
        PackedRecord(value[:cut], "here").to_data()


def test_any_changed_byte_is_an_error() -> None:
    value = structure_record.pack(structure(natoms=9))
    for position in range(4, len(value), 13):
        changed = bytearray(value)
        changed[position] ^= 1
        with pytest.raises(DataError, match="here: the record is damaged"):
            PackedRecord(bytes(changed), "here").to_data()


def test_headers_that_lie_are_errors() -> None:
    value = structure_record.pack(structure(natoms=9))
    for old, new in ((b'"<f4"', b'"<f8"'), (b'"pos"', b'"pox"'), (b"[9,3]", b"[8,3]"), (b"[9,3]", b"[-1] ")):
        content = value[8:].replace(old, new)
        with pytest.raises(DataError, match="here: "):
            PackedRecord(value[:4] + struct.pack("<I", zlib.crc32(content)) + content, "here").to_data()


def test_packed_records_hold_the_whole_range_of_the_fields() -> None:
    data = structure(natoms=3, atomic_numbers=torch.tensor([1, 99, 118]), sid="random1 ü", fid=123456)
    unpacked: Data = PackedRecord(structure_record.pack(data), "here").to_data()
    assert_same(unpacked, data)
    assert unpacked.pos.is_contiguous()
    unpacked.pos += 1.0  # writable, and its own memory
    assert not torch.equal(PackedRecord(structure_record.pack(data), "here").to_data().pos, unpacked.pos)

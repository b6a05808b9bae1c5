"""ASE-LMDB files: nothing is lost on the way there and back, and both kinds train."""

import sys
import zlib
from pathlib import Path
from typing import Any

import ase.db
import lmdb
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import fcc111
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesianParametricRelations
from command_line import run_command
from oc20_files import assert_same, dumps_pyg1, is2re_fields, s2ef_fields, structure, write_lmdb
from torch.utils.data import DataLoader
from torch_geometric.data import Batch

from datasets_oc20 import DataError, LmdbWriter, OC20DataModule, OC20Lmdb
from datasets_oc20.convert import convert
from datasets_oc20.division import group_names
from tests.disk import full_disk

aselmdb = pytest.importorskip("ase_db_backends.aselmdb")


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A file of ours with structures of every kind: no fixed atoms, no targets, not periodic, odd numbers."""
    molecule = {"cell": torch.zeros(1, 3, 3), "pbc": torch.zeros(1, 3, dtype=torch.bool)}
    extreme = torch.tensor([[1e-38, -9999.999, 0.1], [-0.0, 1 / 3, 8192.0009765625]])
    structures = [
        structure(natoms=7, seed=1),
        structure(natoms=3, seed=2, fixed=torch.zeros(3, dtype=torch.bool)),
        structure(natoms=2, seed=3, forces=extreme, energy=-1 / 3),
        structure(natoms=2, seed=4, **molecule),
        structure(natoms=2, seed=5, pbc=torch.tensor([[True, True, False]]), sid="1981709"),
        structure(natoms=2, seed=6, tags=torch.zeros(2, dtype=torch.int64)),
    ]
    bare = structure(natoms=4, seed=7)
    del bare.energy, bare.forces
    relaxed = structure(
        natoms=4,
        seed=8,
        energy=-0.1,
        y_relaxed=torch.tensor([-0.1]),
        y_init=torch.tensor([2.7]),
        pos_relaxed=torch.rand(4, 3),
    )
    del relaxed.forces
    with LmdbWriter(
        tmp_path / "ours.lmdb", "adsorption", {"source": "a test", "options": {"x": [1, 2]}}
    ) as writer:
        for data in [*structures, bare, relaxed]:
            writer.write(data)
    return tmp_path / "ours.lmdb"


def assert_equal_datasets(one: OC20Lmdb, other: OC20Lmdb) -> None:
    assert len(one) == len(other)
    assert one.energy_kind == other.energy_kind
    assert one.natoms.tolist() == other.natoms.tolist()
    for index in range(len(one)):
        assert_same(one[index], other[index])
        assert one[index].pos.numpy().tobytes() == other[index].pos.numpy().tobytes()


def test_there_and_back_without_loss(ours: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.aselmdb", tmp_path / "back.lmdb"
    assert convert(ours, there, "ase") == 8
    assert convert(there, back, "oc20") == 8
    assert_equal_datasets(OC20Lmdb(ours), OC20Lmdb(there))
    assert back.read_bytes() == ours.read_bytes()  # provenance, too
    assert sorted(path.name for path in tmp_path.iterdir() if "natoms" not in path.name) == [
        "back.lmdb",
        "ours.lmdb",
        "there.aselmdb",
    ]


def test_the_stress_there_and_back(tmp_path: Path) -> None:
    data, half = structure(natoms=2, seed=9), torch.rand(1, 3, 3)
    data.stress = half + half.transpose(1, 2)
    with LmdbWriter(tmp_path / "ours.lmdb", "total") as writer:
        writer.write(data)
    convert(tmp_path / "ours.lmdb", tmp_path / "theirs.aselmdb", "ase")
    with ase.db.connect(tmp_path / "theirs.aselmdb", type="aselmdb", readonly=True) as database:
        (row,) = database.select()
    assert row.stress[3] == data.stress[0, 1, 2]
    assert torch.equal(OC20Lmdb(str(tmp_path / "theirs.aselmdb"))[0].stress, data.stress)


@pytest.mark.parametrize("fields", [s2ef_fields, is2re_fields])
def test_files_of_oc20(tmp_path: Path, fields: Any) -> None:
    values = [dumps_pyg1(fields(5 + seed, seed)) for seed in range(4)]
    source = write_lmdb(tmp_path / "oc20.lmdb", values)
    with pytest.raises(DataError, match=r"oc20\.lmdb: .*energies.*declare"):
        convert(source, tmp_path / "x.aselmdb", "ase")
    convert(source, tmp_path / "x.aselmdb", "ase", "adsorption")
    assert_equal_datasets(OC20Lmdb(source, "adsorption"), OC20Lmdb(tmp_path / "x.aselmdb"))


def test_genuine_oc20_file(val_20: Path, tmp_path: Path) -> None:
    convert(val_20, tmp_path / "x.aselmdb", "ase", "adsorption")
    assert_equal_datasets(OC20Lmdb(val_20, "adsorption"), OC20Lmdb(tmp_path / "x.aselmdb"))


def test_ase_reads_the_same(ours: Path, tmp_path: Path) -> None:
    convert(ours, tmp_path / "x.aselmdb", "ase")
    with ase.db.connect(tmp_path / "x.aselmdb", type="aselmdb", readonly=True) as database:
        assert database.metadata["energy_kind"] == "adsorption"
        rows = list(database.select())
    dataset = OC20Lmdb(ours)
    assert len(rows) == len(dataset)
    for row, data in zip(rows, dataset, strict=True):
        atoms = row.toatoms()
        assert np.array_equal(atoms.positions, data.pos.numpy())
        assert np.array_equal(atoms.get_tags(), data.tags.numpy())
        fixed = [index for constraint in atoms.constraints for index in constraint.index]
        assert sorted(fixed) == data.fixed.nonzero().flatten().tolist()
        assert (row.data["sid"], row.data["fid"]) == (data.sid, data.fid)
        if "energy" in data:
            assert atoms.get_potential_energy() == data.energy.item()
        if "forces" in data:
            forces = atoms.get_forces(apply_constraint=False)
            assert np.array_equal(forces.astype("f4"), data.forces.numpy())


def write_ase(path: Path, *structures: Atoms, data: dict[str, Any] | None = None) -> Path:
    with aselmdb.LMDBDatabase(path, use_lock_file=False) as database:
        for atoms in structures:
            database.write(atoms, data=data)
    return path


def slab(energy: float = -3.0) -> Atoms:
    """As a user of ASE would make it; tag 1 is the top layer of `fcc111`."""
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8.0)
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() > 1))
    atoms.set_tags((atoms.get_tags() == 1).astype(int))
    forces = np.random.default_rng(0).normal(size=(len(atoms), 3))
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=np.zeros(6))
    return atoms


def test_rows_without_a_name_are_told_apart_over_all_shards(tmp_path: Path) -> None:
    """Every file counts its rows from 1; frames of a relaxation must not be parted by these numbers."""
    shards = [tmp_path / folder / "data.0000.aselmdb" for folder in ("one", "two")]
    for shard in shards:
        shard.parent.mkdir()
        write_ase(shard, *(slab(-3.0 - k) for k in range(3)))
    dataset = OC20Lmdb(shards, energy_kind="total")
    sids = [data.sid for data in dataset]
    assert sids[0] == "one-data_0000-1"
    assert len(set(sids)) == 6
    assert len(set(group_names(sids, [data.atomic_numbers.numpy() for data in dataset]))) == 1


def test_a_file_that_ase_wrote(tmp_path: Path) -> None:
    path = write_ase(
        tmp_path / "x.aselmdb", *(slab(-3.0 - k) for k in range(6)), data={"sid": 7, "fid": "frame3"}
    )
    dataset = OC20Lmdb(path, energy_kind="total")
    assert [data.energy.item() for data in dataset] == [-3.0, -4.0, -5.0, -6.0, -7.0, -8.0]
    data, atoms = dataset[0], slab()
    assert (data.sid, data.fid) == ("7", 3)
    assert data.pbc.tolist() == [[True, True, False]]
    assert torch.equal(data.fixed, torch.tensor(atoms.positions[:, 2] < atoms.positions[:, 2].max() - 0.1))
    assert data.tags.sum() == 4
    assert np.array_equal(data.forces.numpy(), atoms.calc.results["forces"].astype("f4"))
    assert dataset.natoms.tolist() == [12] * 6
    assert OC20Lmdb(path).energy_kind is None


def test_deleted_rows_are_stepped_over(tmp_path: Path) -> None:
    path = write_ase(tmp_path / "x.aselmdb", *(slab(float(k)) for k in range(1, 11)))
    with aselmdb.LMDBDatabase(path, use_lock_file=False) as database:
        database.delete([1, 4, 5, 10])
    (tmp_path / "x.aselmdb-lock").unlink()
    dataset = OC20Lmdb(path)
    assert [data.energy.item() for data in dataset] == [2, 3, 6, 7, 8, 9]
    assert dataset[-1].energy.item() == 9
    with pytest.raises(IndexError):
        dataset[6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda atoms: atoms.arrays.pop("tags") is None or atoms.set_constraint(),
            r"row 1: has no tags and no constraint; call atoms\.set_tags",
        ),
        (
            lambda atoms: atoms.set_constraint(
                FixCartesianParametricRelations.from_expressions([0], [], ["0.0", "0.0", "0.0"])
            ),
            "constraint FixCartesianParametricRelations does not say which",
        ),
        (lambda atoms: atoms.calc.results.update(energy=float("nan")), "energy holds NaN"),
        (lambda atoms: atoms.set_tags(3), "atom 0 has tag 3"),
    ],
)
def test_rows_that_are_wrong(tmp_path: Path, change: Any, message: str) -> None:
    atoms = slab()
    change(atoms)
    path = write_ase(tmp_path / "x.aselmdb", atoms)
    with pytest.raises(DataError, match=rf"x\.aselmdb, row 1: .*{message.removeprefix('row 1: ')}"):
        OC20Lmdb(path)[0]


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = write_ase(tmp_path / "x.aselmdb", slab())
    for key, value, message in (
        (b"1", b"not compressed", r"key 1: not of an ASE database"),
        (b"1", zlib.compress(b'{"numbers": [1]}'), r"row 1: not a row of an ASE database \(no positions\)"),
        (b"1", zlib.compress(b"[1]"), "row 1: not a row of an ASE database"),
        (b"nextid", b"x", "key nextid: not of an ASE database"),
    ):
        broken = tmp_path / f"{key.decode()}{len(value)}.aselmdb"
        values = dict(_items(path)) | {key: value}
        _write_items(broken, values)
        with pytest.raises(DataError, match=message):
            OC20Lmdb(broken)[0]


def _items(path: Path) -> list[tuple[bytes, bytes]]:
    with lmdb.open(str(path), subdir=False, lock=False, readonly=True) as file, file.begin() as transaction:
        return [(bytes(key), bytes(value)) for key, value in transaction.cursor()]


def _write_items(path: Path, items: dict[bytes, bytes]) -> None:
    with (
        lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in items.items():
            transaction.put(key, value)


def test_folders_of_shards(ours: Path, tmp_path: Path) -> None:
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    source.mkdir()
    for name in ("b", "a"):
        with LmdbWriter(source / f"{name}.lmdb", "total") as writer:
            for seed in range(3):
                writer.write(structure(seed=seed + ord(name), energy=-100.0 - seed))
    assert convert(source, there, "ase", num_workers=2) == 6
    assert sorted(path.name for path in there.iterdir()) == ["a.aselmdb", "b.aselmdb"]
    assert convert(there, back, "oc20", num_workers=1) == 6
    for path in source.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()
    assert_equal_datasets(OC20Lmdb(source), OC20Lmdb(there))
    # Going on: what is there is kept, what is missing is made.
    (there / "a.aselmdb").unlink()
    before = (there / "b.aselmdb").stat().st_mtime_ns
    assert convert(source, there, "ase", num_workers=1) == 6
    assert (there / "b.aselmdb").stat().st_mtime_ns == before
    assert_equal_datasets(OC20Lmdb(source), OC20Lmdb(there))
    with pytest.raises(DataError, match=r"b\.aselmdb: .*3 records instead of 8"):
        convert(ours, there / "b.aselmdb", "ase")
    with pytest.raises(DataError, match="source: is the source"):
        convert(source, source, "ase")
    (source / "c.aselmdb").write_bytes((there / "a.aselmdb").read_bytes())
    with pytest.raises(DataError, match=r"\*\.lmdb and \*\.aselmdb"):
        OC20Lmdb(source)


def test_loaders_and_batches(ours: Path, tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "x.lmdb", "adsorption") as writer:
        for seed in range(12):
            writer.write(
                structure(natoms=3 + seed, seed=seed, energy=0.1 * seed, fixed=torch.arange(3 + seed) < 2)
            )
    convert(tmp_path / "x.lmdb", tmp_path / "x.aselmdb", "ase")
    batches = []
    for name in ("x.lmdb", "x.aselmdb"):
        module = OC20DataModule(
            train=tmp_path / name, val=tmp_path / name, batch_size=4, num_workers=0, seed=3
        )
        module.setup("fit")
        batches.append((list(module.train_dataloader()), module.normalizers, module.energy_kind))
    assert batches[0][2] == batches[1][2] == "adsorption"
    assert str(batches[0][1]) == str(batches[1][1])
    for one, other in zip(batches[0][0], batches[1][0], strict=True):
        assert_same(one, other)
    loader = DataLoader(
        OC20Lmdb(tmp_path / "x.aselmdb"), batch_size=4, num_workers=2, collate_fn=Batch.from_data_list
    )
    assert torch.cat([batch.energy for batch in loader]).tolist() == [
        data.energy.item() for data in OC20Lmdb(tmp_path / "x.lmdb")
    ]


def test_a_missing_package_is_one_sentence(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(ours, tmp_path / "x.aselmdb", "ase")
    monkeypatch.setitem(sys.modules, "ase_db_backends.aselmdb", None)  # as if it were not installed
    with pytest.raises(DataError, match=r"needs the package ase-db-backends; .*pip install '\.\[ase-lmdb\]'"):
        convert(ours, tmp_path / "y.aselmdb", "ase")
    assert len(OC20Lmdb(tmp_path / "x.aselmdb")) == 8  # reading needs no other package
    assert OC20Lmdb(tmp_path / "x.aselmdb")[0].natoms == 7


def test_a_failed_conversion_leaves_nothing(ours: Path, tmp_path: Path) -> None:
    with full_disk(10_000), pytest.raises(OSError, match=r"x\.aselmdb"):
        convert(ours, tmp_path / "x.aselmdb", "ase")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.lmdb"]


def test_command(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "x.aselmdb"
    assert run_command("data convert", "--data", ours, "--out", out, "--to", "ase") == 0
    assert capsys.readouterr().out == f"8 records in {out}\n"
    assert_equal_datasets(OC20Lmdb(ours), OC20Lmdb(out))

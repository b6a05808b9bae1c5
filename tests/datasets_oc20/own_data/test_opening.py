"""Own results opened like an LMDB, and structures written to one."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from own_files import DATA, crystals, in_folder, labelled, slab, trajectory  # noqa: F401

from datasets_oc20 import OC20Lmdb, open_dataset, write_lmdb
from datasets_oc20.errors import DataError
from datasets_oc20.own_data import opening
from datasets_oc20.own_data.atom_rules import AtomRule

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("in_folder")]


def test_files_in_memory_are_as_the_imported_ones() -> None:
    structures = trajectory(slab(), 4)
    write("a.traj", structures)
    write_lmdb("a.lmdb", structures, "total")
    memory, stored = open_dataset("a.traj"), open_dataset(Path("a.lmdb"))
    assert isinstance(memory, OC20Lmdb)
    assert type(stored) is OC20Lmdb
    assert len(memory) == len(stored) == 4
    assert memory.energy_kind == stored.energy_kind == "total"
    assert memory.natoms.tolist() == stored.natoms.tolist() == [12] * 4
    assert memory.fields(0) == stored.fields(0)
    assert memory.describe(1) == "a.traj, frame 1"
    for copy in (memory, pickle.loads(pickle.dumps(memory))):
        for number in range(-1, 4):
            for name in ("pos", "energy", "forces", "tags", "fixed", "cell", "pbc"):
                assert np.array_equal(copy[number][name], stored[number][name]), name
    with pytest.raises(IndexError, match="index 4 of 4"):
        memory[4]


def test_lmdb_files_beside_others_are_read_with_them() -> None:
    write("a.traj", trajectory(slab(), 4))
    write_lmdb("b.lmdb", trajectory(slab("Cu"), 3), "total")
    data = open_dataset(["a.traj", Path("b.lmdb")])
    assert (len(data), data.energy_kind) == (7, "total")
    assert data[6].atomic_numbers.unique().tolist() == [29]
    for paths in (["a.traj", "missing.traj"], ["missing.traj", "a.traj"]):
        with pytest.raises(DataError, match=r"^missing\.traj: no such file"):
            open_dataset(paths)


def test_other_files_beside_the_lmdb_files_of_a_folder_are_named(caplog: pytest.LogCaptureFixture) -> None:
    folder = Path("set")
    folder.mkdir()
    write_lmdb(folder / "b.lmdb", trajectory(slab("Cu"), 3), "total")
    (folder / "notes.txt").write_text("of the set")
    caplog.clear()
    assert len(open_dataset(folder)) == 3
    assert not caplog.messages
    for name in ("OUTCAR.gz", "a.traj"):
        write(folder / name, trajectory(slab(), 1), format="traj")
    assert len(open_dataset(folder)) == 3
    assert caplog.messages == [
        "set: its LMDB files alone are read, not OUTCAR.gz and 1 more: name these, too, or keep them apart."
    ]


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    frames = trajectory(slab(), 3)
    frames[1].calc.results["energy"] = np.nan
    write("a.traj", frames)
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(["a.traj", DATA / "OUTCAR.Al.gz"])) == 2
    assert "left out: a.traj, frame 1: the energy is not finite (NaN)" in caplog.text
    with pytest.raises(DataError, match=r"OUTCAR.Al.gz: no frame can be used .*OUTCAR.Al.gz, frame 0"):
        open_dataset(DATA / "OUTCAR.Al.gz")


def test_many_frames_with_one_fault_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    frames = trajectory(slab(), 12)
    for atoms in frames[3:]:
        atoms.calc.results["energy"] = np.nan
    frames[4].calc.results |= frames[0].calc.results
    write("a.traj", frames)
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset("a.traj")) == 4
    lines = [record.message for record in caplog.records if "left out" in record.message]
    assert lines == ["left out: a.traj, 8 frames (first 3, last 11): the energy is not finite (NaN)."]


def test_options_of_the_import_are_said_to_be_its_own(caplog: pytest.LogCaptureFixture) -> None:
    frames = trajectory(slab(), 4)
    write("a.traj", frames)
    with caplog.at_level(logging.WARNING):
        open_dataset("a.traj")
    assert "(--adsorbate is an option of `equiformer2 data import`" in caplog.text
    for atoms in frames[2:]:
        atoms.calc.results["energy"] -= 5000.0
    write("b.extxyz", frames)
    with pytest.raises(DataError, match=r"give --mixed \(--mixed is an option of `equiformer2 data import`"):
        open_dataset("b.extxyz")
    write("c.extxyz", frames)
    text = Path("c.extxyz").read_text()
    Path("c.extxyz").write_text(text.replace("energy=", "REF_energy="))
    with pytest.raises(DataError, match=r"frames 0 to 3: .*--energy-key REF_energy takes that key \(--en"):
        open_dataset("c.extxyz")


def test_structures_without_energies_can_be_predicted() -> None:
    write("POSCAR", bulk("Cu"))
    assert len(open_dataset("POSCAR", needs_energy=False)) == 1
    with pytest.raises(DataError, match="it has no energy"):
        open_dataset("POSCAR")


def test_a_large_set_is_for_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.traj", trajectory(slab(), 4))
    monkeypatch.setattr(opening, "MAX_FRAMES", 3)
    with pytest.raises(
        DataError, match=r"4 frames, too much .*equiformer2 data import FILES --out NAME\.lmdb"
    ):
        open_dataset("a.traj")


def test_structures_are_written_with_all_they_hold(caplog: pytest.LogCaptureFixture) -> None:
    structures = trajectory(slab(), 20)
    for number, atoms in enumerate(structures):
        atoms.set_tags(list(range(12)))  # no tags of OC20
        atoms.calc.results["stress"] = np.arange(6.0) + number
        atoms.info |= {"sid": "my slab", "fid": 100 + number}
    with caplog.at_level(logging.WARNING):
        assert write_lmdb("a.lmdb", structures, energy_kind="total", metadata={"code": "EMT"}) == 20
    assert len(caplog.records) == 1
    assert "20 of 20 structures: tags beyond 0, 1, 2" in caplog.text
    record = OC20Lmdb("a.lmdb")[3]
    assert (record.sid, record.fid) == ("my slab", 103)
    assert record.energy.item() == structures[3].get_potential_energy()
    assert np.allclose(record.forces, structures[3].calc.results["forces"])
    assert record.stress[0, 0].tolist() == [3.0, 8.0, 7.0]
    assert record.fixed.tolist() == [True] * 8 + [False] * 4
    with pytest.raises(DataError, match=r"a\.lmdb: exists already"):
        write_lmdb("a.lmdb", structures, "total")
    assert write_lmdb("a.lmdb", structures[:2], "adsorption", overwrite=True) == 2
    assert OC20Lmdb("a.lmdb").energy_kind == "adsorption"


def _without_energy() -> list[Atoms]:
    return [crystals()[0], bulk("Cu")]


def _some_forces() -> list[Atoms]:
    return [crystals()[0], labelled(bulk("Cu"), forces=None)]


def _nan() -> list[Atoms]:
    atoms = bulk("Cu")
    atoms.calc = SinglePointCalculator(atoms, energy=np.nan)
    return [atoms]


WRONG: list[tuple[object, str, str]] = [
    (_without_energy(), "total", r"structure 1 \(Cu\): it has no energy"),
    (_some_forces(), "total", "structure 1: only some structures have forces"),
    (_nan(), "total", "structure 0 .*not finite"),
    ([], "total", "no record to write"),
    ([1], "total", "structure 0: is a int, not an ase.Atoms"),
    (crystals(), "binding", "energy_kind is 'binding'"),
]


@pytest.mark.parametrize(
    ("structures", "kind", "message"), WRONG, ids=[message[:20] for *_, message in WRONG]
)
def test_wrong_structures_leave_no_file(structures: list[Atoms], kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_lmdb("a.lmdb", structures, kind)
    assert not list(Path().iterdir())


CHOICES: list[tuple[str, list[int] | str]] = [
    ("last 2", [6, 7]),
    ("first 1", [0]),
    ("indices 0-2,5", [0, 1, 2, 5]),
    ("3", [3]),
    ("CO", [6, 7]),
    ("OC", [6, 7]),
    ("O", [7]),
    ("z<1.5", [0, 1, 2, 3]),
    ("x >= 2", [2, 3]),
    ("none", []),
    ("last 9", "asks for 9 atoms, but there are 8"),
    ("indices 7-9", "0 to 7"),
    ("Ni", "cannot be told from the other atoms"),
    ("N", "cannot be told from the other atoms"),
]


@pytest.mark.parametrize(("text", "expected"), CHOICES)
def test_rules_for_atoms(text: str, expected: list[int] | str) -> None:
    positions = [[n % 4, 0, n // 4 * 2] for n in range(6)] + [[0, 0, 6], [0, 0, 7.1]]
    atoms = Atoms("Cu3NiCuNiCO", positions)
    atoms.positions[4:6, 0] = 0
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            AtomRule(text).choose(atoms)
    else:
        assert np.flatnonzero(AtomRule(text).choose(atoms)).tolist() == expected


# Heights of O and H atoms on an oxide, in the order of the file (O, Ti, O, H), and which ones are the OH.
HYDROXYL: list[tuple[list[float], list[int] | str]] = [
    ([0.0, 0.5, 2.0, 2.97], [2, 3]),  # the last and the topmost atoms
    ([3.5, 0.5, 2.0, 2.97], [2, 3]),  # another O is the topmost, too far from the H
    ([0.0, 0.5, 2.0, 5.0], "cannot be told from the other atoms"),  # the H has left
]


@pytest.mark.parametrize(("heights", "expected"), HYDROXYL, ids=["on top", "below another O", "dissociated"])
def test_atoms_of_a_molecule_hang_together(heights: list[float], expected: list[int] | str) -> None:
    atoms = Atoms(
        "OTiOH",
        [[3.0 * (n == 0), 0.1, height] for n, height in enumerate(heights)],
        cell=[9, 9, 20],
        pbc=True,
    )
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            AtomRule("OH").choose(atoms)
    else:
        assert np.flatnonzero(AtomRule("OH").choose(atoms)).tolist() == expected


@pytest.mark.parametrize(
    "text", ["", "z<4 or 1", "__import__('os')", "last two", "z<nan", "Xx2", "first -1", "1;2"]
)
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="is not understood; give 'last 2'"):
        AtomRule(text)

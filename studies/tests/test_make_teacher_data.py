"""Making teacher data: what is written, and that a stopped command goes on as if nothing had happened."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111
from ase.calculators.emt import EMT
from ase.db import connect
from ase.io import write

from datasets_oc20 import OC20Lmdb
from datasets_oc20.extxyz import read_frames
from datasets_oc20.preprocess import preprocess
from datasets_oc20.raw_release import read_references
from equiformer2 import EquiformerV2Calculator
from studies.make_teacher_data import DataFolder, Settings, Start, check_elements, main, make, read_bulks
from studies.prototypes import Bulk, UnsuitableError
from studies.study_data import read_index
from tests.disk import full_disk
from tests.pruning.search_helpers import save_tiny

QUICK = Settings("teacher", steps=6, frames=4, rattled=2, clean_steps=3)
NAME = QUICK.prefix
MISSING_PACKAGES = importlib.util.find_spec("sevenn") is None


def slab_of(metal: str) -> Start:
    """An fcc(111) slab, clean and with O and with CO, as the placement package would give it."""
    clean = fcc111(metal, (1, 1, 3), vacuum=6.0, periodic=True)
    clean.set_tags([int(layer == 1) for layer in clean.get_tags()])
    adsorbed = []
    for name in ("O", "CO"):
        atoms = clean.copy()
        molecule = Atoms(name, positions=[(0, 0, 1.15 * at) for at in range(len(name))])
        add_adsorbate(atoms, molecule, 1.7, position=(0.3, 0.5))
        atoms.set_tags([*clean.get_tags(), *[2] * len(name)])
        atoms.pbc = (True, True, False)
        adsorbed.append((f"*{name}", atoms))
    return Start(Bulk(bulk(metal, cubic=True), "pure"), (1, 1, 1), clean, adsorbed)


def source(number: int) -> Start:
    if number == 1:
        raise UnsuitableError("Ni4: no slab can be cut")
    return slab_of(("Cu", "Ni", "Pt", "Pd")[number % 4])


def fill(folder: Path, systems: int, settings: Settings = QUICK) -> DataFolder:
    data = DataFolder(folder, settings)
    make(data, source, EMT(), None, settings, systems)
    return data


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "made.json"}


def test_frames_hold_what_the_teacher_says_of_them(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", 3)
    names = [NAME + end for end in ("s0a0", "s0a1", "s2a0")]
    assert [system.sid for system in read_index(tmp_path / "data")] == names
    assert data.groups == {"0": names[:2], "1": "Ni4: no slab can be cut"}
    references = read_references(tmp_path / "data")
    for entry in data.index.values():
        frames = list(read_frames(tmp_path / "data" / f"{entry['sid']}.extxyz.xz"))
        assert len(frames) == entry["frames"] == 6
        for frame in frames:
            assert frame.pbc.all()
            assert np.array_equal(frame.fixed, frame.tags == 0)
            atoms = Atoms(frame.atomic_numbers, frame.pos, cell=frame.cell, pbc=frame.pbc, calculator=EMT())
            assert frame.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
            assert frame.forces == pytest.approx(atoms.get_forces(), abs=1e-3)
        energies = [frame.energy - references[entry["sid"]] for frame in frames]
        assert entry["e0"] == pytest.approx(energies[0], abs=1e-3)
        assert entry["emin"] == pytest.approx(min(energies), abs=1e-3)
        # Held atoms stay, the others move, and rattled frames are not on the trajectory.
        moved = np.abs(frames[-1].pos - frames[0].pos)
        assert moved[frames[0].fixed].max() == 0
        assert moved[~frames[0].fixed].max() > 0.02
    report = preprocess(tmp_path / "data", tmp_path / "data.lmdb", num_workers=1)
    assert report.written == 18 == len(OC20Lmdb(tmp_path / "data.lmdb"))


def test_reference_is_the_clean_slab_and_the_gas_atoms(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", 2)
    first, second = read_references(tmp_path / "data").values()
    assert second - first == pytest.approx(data.gas["C"], abs=1e-5)
    assert set(data.gas) == {"H", "O", "C", "N"}


def test_a_stopped_command_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    fill(tmp_path / "whole", 4)
    folder = tmp_path / "stopped"

    def stopping(number: int) -> Start:
        start = source(number)
        if number == 0:
            start.adsorbed[1] = ("*CO", None)  # type: ignore[call-overload]
        return start

    with pytest.raises(AttributeError):
        make(DataFolder(folder, QUICK), stopping, EMT(), None, QUICK, 4)
    assert [system.sid for system in read_index(folder)] == [NAME + "s0a0"]
    assert preprocess(folder, tmp_path / "part.lmdb", num_workers=1).written == 6
    kept = (folder / f"{NAME}s0a0.extxyz.xz").stat().st_mtime_ns
    fill(folder, 4)
    assert (folder / f"{NAME}s0a0.extxyz.xz").stat().st_mtime_ns == kept
    assert contents(folder) == contents(tmp_path / "whole")
    fill(folder, 5)
    assert len(read_index(folder)) == 5


def test_a_kill_between_two_files_leaves_a_folder_that_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    fill(folder, 2)
    whole = contents(folder)
    # The frames of the second system are there, its line of the index is not.
    index = folder / "index.jsonl"
    index.write_text(index.read_text().splitlines(keepends=True)[0])
    state = json.loads((folder / "made.json").read_text())
    state["groups"] = {}
    (folder / "made.json").write_text(json.dumps(state))
    assert preprocess(folder, tmp_path / "part.lmdb", num_workers=1).files == 2
    fill(folder, 2)
    assert contents(folder) == whole


def test_a_network_drives_and_the_teacher_labels(tmp_path: Path) -> None:
    settings = Settings("0" * 64, steps=5, frames=3, rattled=1, clean_steps=2)
    driver = EquiformerV2Calculator(save_tiny(tmp_path / "tiny.pt"))
    data = DataFolder(tmp_path / "data", settings)
    make(data, source, EMT(), driver, settings, 1)
    (entry,) = data.index.values()
    assert entry["driven"] == "network"
    frames = list(read_frames(tmp_path / "data" / f"{entry['sid']}.extxyz.xz"))
    by_teacher = list(read_frames(fill(tmp_path / "other", 1).folder / f"{NAME}s0a0.extxyz.xz"))
    assert np.array_equal(frames[0].pos, by_teacher[0].pos)
    assert np.abs(frames[1].pos - by_teacher[1].pos).max() > 1e-4
    for frame in frames:
        atoms = Atoms(frame.atomic_numbers, frame.pos, cell=frame.cell, pbc=frame.pbc, calculator=EMT())
        assert frame.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)


def test_frames_beyond_the_limits_are_left_out(tmp_path: Path) -> None:
    """A limit between the forces of the frames keeps some of them, a lower one rejects the system."""
    frames = list(read_frames(fill(tmp_path / "all", 1).folder / f"{NAME}s0a0.extxyz.xz"))
    forces = sorted(frame.max_free_force for frame in frames)
    some = Settings("teacher", 6, 4, 2, clean_steps=3, max_force=(forces[-1] + forces[-2]) / 2)
    kept = fill(tmp_path / "some", 1, some)
    assert kept.index[some.prefix + "s0a0"]["frames"] == 5
    none = Settings("teacher", 6, 4, 2, clean_steps=3, max_force=forces[0] / 2)
    data = DataFolder(tmp_path / "none", none)
    with pytest.raises(ValueError, match="the last 50 slabs gave no system"):
        make(data, lambda number: slab_of("Cu") if number == 0 else source(1), EMT(), None, none, 1)
    assert data.rejected == {
        f"{none.prefix}s0a{at}": "0 frames within the limits of energy and force" for at in range(2)
    }


def test_other_settings_and_other_files_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "data", 1)
    # Systems of two folders can be told apart, also in one data set.
    assert Settings("teacher", 7, 4, 2, clean_steps=3).prefix != NAME
    with pytest.raises(ValueError, match="was made with another steps"):
        DataFolder(tmp_path / "data", Settings("teacher", 7, 4, 2, clean_steps=3))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        DataFolder(tmp_path / "other", QUICK)


def test_bulks_of_files(tmp_path: Path) -> None:
    with connect(tmp_path / "bulks.db") as database:
        database.write(bulk("Cu", cubic=True), mpid="mp-30")
        database.write(bulk("Pt"))
    write(tmp_path / "nickel.cif", bulk("Ni", cubic=True))
    found = read_bulks([tmp_path / "bulks.db", tmp_path / "nickel.cif"])
    assert [(one.formula, one.origin) for one in found] == [
        ("Cu4", "mp-30"),
        ("Pt", "bulks-2"),
        ("Ni4", "nickel"),
    ]
    write(tmp_path / "slab.xyz", fcc111("Cu", (1, 1, 3), vacuum=6.0))
    with pytest.raises(ValueError, match="not periodic in three directions"):
        read_bulks([tmp_path / "slab.xyz"])
    (tmp_path / "broken.db").write_text("this is no database")
    with pytest.raises(ValueError, match="no ASE database"):
        read_bulks([tmp_path / "broken.db"])
    with pytest.raises(ValueError, match="no such file"):
        read_bulks([tmp_path / "missing.db"])


def test_an_element_that_the_teacher_does_not_know_is_named() -> None:
    bulks = [Bulk(bulk("Cu"), "mp-30"), Bulk(bulk("Po", "sc", a=3.35), "mp-404")]
    check_elements(bulks, {29, 84})
    with pytest.raises(ValueError, match="the bulk mp-404 holds Po, which the teacher does not know"):
        check_elements(bulks, {29, 78})


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "whole", 3)
    folder = tmp_path / "data"
    fill(folder, 1)
    before = contents(folder)
    with full_disk(600), pytest.raises(OSError, match=r"made\.json"):
        fill(folder, 3)
    assert contents(folder) == before
    fill(folder, 3)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.skipif(not MISSING_PACKAGES, reason="the package is installed")
def test_a_missing_package_is_named_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run pip install sevenn"):
        main(["--out", str(tmp_path / "data"), "--systems", "1"])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--systems", "0"], "give 1 or more"), (["--systems", "1", "--seed", "-1"], "give 0 or more")],
)
def test_bad_arguments(arguments: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        main(["--out", str(tmp_path / "data"), *arguments])

"""Frames and files that cannot be used are named, and the others are imported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from own_files import Change, in_folder, run, slab, trajectory  # noqa: F401

from datasets_oc20 import OC20Lmdb

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("in_folder")]


def _nan_energy(frames: list[Atoms]) -> list[Atoms]:
    frames[1].calc.results["energy"] = np.nan
    return frames


def _nan_force(frames: list[Atoms]) -> list[Atoms]:
    frames[1].calc.results["forces"][3, 1] = np.nan
    return frames


def _no_forces(frames: list[Atoms]) -> list[Atoms]:
    del frames[1].calc.results["forces"]
    return frames


def _no_energy(frames: list[Atoms]) -> list[Atoms]:
    del frames[1].calc.results["energy"]
    return frames


def _flat_cell(frames: list[Atoms]) -> list[Atoms]:
    frames[1].set_cell(frames[1].cell.array * [1, 1, 0])
    return frames


def _plane_cell(frames: list[Atoms]) -> list[Atoms]:
    cell = frames[1].cell.array.copy()
    cell[2] = cell[0] + cell[1]
    frames[1].set_cell(cell)
    return frames


def _parallel_vectors(frames: list[Atoms]) -> list[Atoms]:
    for atoms in (frames[1], frames[1].calc.atoms):
        atoms.cell[1], atoms.cell[2] = 2 * atoms.cell[0], 0.0
        atoms.pbc = (True, True, False)
    return frames


def _moved(positions: Any) -> Change:
    def change(frames: list[Atoms]) -> list[Atoms]:
        frames[1].positions[3] = positions
        frames[1].calc.atoms.positions[3] = positions
        return frames

    return change


def _at_an_image(frames: list[Atoms]) -> list[Atoms]:
    return _moved(frames[1].positions[9] + frames[1].cell[0] - frames[1].cell[1])(frames)


def _huge_force(frames: list[Atoms]) -> list[Atoms]:
    frames[1].calc.results["forces"][2] = [2e4, 0, 0]
    return frames


BAD_FRAMES: list[tuple[Change, str]] = [
    (_nan_energy, "the energy is not finite (NaN)"),
    (_nan_force, "the forces on atom 3 are not finite (NaN)"),
    (_no_forces, "it has no forces, which other frames have"),
    (_no_energy, "it has no energy"),
    (_flat_cell, "periodic along c but has no lattice vector"),
    (_plane_cell, "the cell has no volume"),
    (_parallel_vectors, "the cell has no volume"),
    (_huge_force, "the force on atom 2 is"),
    (_moved([0.0, 1e30, 0.0]), "atom 3 is 1e+30 Å away from the origin"),
    (_at_an_image, "atoms 3 and 9 are at the same place (a periodic image counts)"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_FRAMES, ids=[reason[:20] for _, reason in BAD_FRAMES])
@pytest.mark.parametrize("name", ["a.traj", "a.extxyz"])
def test_a_bad_frame_is_dropped_and_named(change: Change, reason: str, name: str) -> None:
    write(name, change(trajectory(slab(), 4)))
    report = run(name)
    assert [(item.file, item.index) for item in report.dropped] == [(name, 1)]
    assert reason in report.dropped[0].reason
    assert report.kept == 3
    assert [record.fid for record in OC20Lmdb("out.lmdb")] == [0, 2, 3]


ODD_VALUES: list[tuple[str, object, str]] = [
    ("tags", np.array(["slab"] * 12), "its tags are not whole numbers"),
    ("tags", np.full(12, 0.9), "its tags are not whole numbers"),
    ("tags", np.full(12, np.nan), "its tags are not whole numbers"),
    ("magmom", "AFM", "its values cannot be used (could not convert string to float: 'AFM')"),
]


@pytest.mark.parametrize(("key", "value", "reason"), ODD_VALUES, ids=["text", "fractions", "NaN", "magmom"])
def test_values_of_odd_kinds_cost_their_frame_alone(key: str, value: object, reason: str) -> None:
    frames = trajectory(slab(), 4)
    if isinstance(value, np.ndarray):
        frames[1].arrays[key] = value
    else:
        frames[1].info[key] = value
    write("a.extxyz", frames)
    write("good.extxyz", trajectory(slab("Cu"), 3))
    report = run("a.extxyz", "good.extxyz")
    assert [(item.file, item.index) for item in report.dropped] == [("a.extxyz", 1)]
    assert reason in report.dropped[0].reason
    assert report.kept == 6


def _cut(text: str) -> str:
    return text[: int(len(text) * 0.9)]


def _word(text: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[16] = "Pt 1 2 x 0 0 0 0\n"
    return "".join(lines)


def _more_columns(text: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[16] = lines[16].replace("Pt ", "Pt 7.5 ", 1)
    return "".join(lines)


def _less_columns(text: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[17] = lines[17].rsplit(maxsplit=1)[0] + "\n"
    return "".join(lines)


def _empty_line(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:28], "\n", *lines[28:]])


DAMAGED: list[tuple[Callable[[str], str], list[int], int | None, str]] = [
    (_cut, [0, 1, 2], 3, "ends inside the frame"),
    (_word, [0, 2, 3], 1, "the line of atom 0 has 8 columns, and Properties names 9"),
    (_more_columns, [0, 2, 3], 1, "the line of atom 0 has 10 columns, and Properties names 9"),
    (_less_columns, [0, 2, 3], 1, "the line of atom 1 has 8 columns, and Properties names 9"),
    (lambda text: text.replace("Pt ", "Xq ", 1), [1, 2, 3], 0, "there is no element 'Xq'"),
    (_empty_line, [0, 1], None, "empty line before frame 2"),
    (lambda text: text.replace("12\n", "99999999999\n", 1), [], None, "too many"),
    (lambda _: "", [], None, "empty"),
    (lambda _: "no structure\n", [], None, "not a number of atoms"),
]


@pytest.mark.parametrize(("damage", "kept", "index", "reason"), DAMAGED)
def test_a_damaged_file_does_not_stop_the_others(
    damage: Callable[[str], str], kept: list[int], index: int | None, reason: str
) -> None:
    write("a.extxyz", trajectory(slab(), 4))
    Path("a.extxyz").write_text(damage(Path("a.extxyz").read_text()))
    write("b.extxyz", trajectory(slab("Cu"), 2))
    report = run("a.extxyz", "b.extxyz", "missing.traj")
    places = [(item.file, item.index) for item in report.dropped]
    assert places == [("missing.traj", None), ("a.extxyz", index)]
    assert reason in report.dropped[1].reason
    records = list(OC20Lmdb("out.lmdb"))
    assert [record.fid for record in records] == [*kept, 0, 1]

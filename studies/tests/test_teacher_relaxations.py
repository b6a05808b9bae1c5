"""Relaxations against the teacher's: the choice, the comparison, what is kept; EMT stands for the teacher."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from ase.calculators.emt import EMT

from equiformer2.inference.batched import RelaxationSettings
from studies.study_data import read_index
from studies.study_errors import LARGE
from studies.teacher_relaxations import (
    End,
    Start,
    choose,
    compare,
    main,
    markdown,
    read_ends,
    read_starts,
    relax_starts,
    summarize,
    teacher_energies,
    teacher_predict,
    write_ends,
)
from studies.tests.teacher_folders import copy_systems
from tests.pruning.search_helpers import save_tiny

#: Systems of aluminium and copper with C, H and O, which EMT knows.
SYSTEMS = ["tm300016", "tm300155"]
SETTINGS = RelaxationSettings(fmax=0.05, steps=4, frames="ends")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_systems(tmp_path_factory.mktemp("data") / "test", SYSTEMS)


@pytest.fixture(scope="module")
def starts(folder: Path) -> list[Start]:
    return read_starts(folder, read_index(folder))


@pytest.fixture(scope="module")
def relaxed(folder: Path, starts: list[Start], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's ends of both systems."""
    runs = tmp_path_factory.mktemp("runs")
    predict = teacher_predict(EMT(), {start.system.sid: start.reference for start in starts})
    ends = relax_starts(predict, starts, SETTINGS, runs / "teacher", {"checkpoint": "emt"}, 1)
    write_ends(runs / "relaxed", starts, ends, EMT(), SETTINGS)
    return runs / "relaxed"


def test_the_choice_is_spread_over_bulks_and_grows_at_its_end() -> None:
    systems = read_index(LARGE / "test")
    chosen = choose(systems, 20, seed=0)
    assert len({system.bulk for system in chosen}) == 20
    assert choose(systems, 5, seed=0) == chosen[:5]
    assert choose(systems, 20, seed=1) != chosen
    assert choose(list(reversed(systems)), 20, seed=0) == chosen
    everything = choose(systems, len(systems), seed=0)
    assert {system.sid for system in everything} == {system.sid for system in systems}
    with pytest.raises(ValueError, match="give at most as many"):
        choose(systems, len(systems) + 1, seed=0)


def test_rmsd_is_of_the_adsorbate_to_the_nearest_image(starts: list[Start]) -> None:
    start = starts[0]
    positions = start.frame.pos
    moved = positions + np.array([0.3, 0.0, 0.4])
    moved[start.frame.tags != 2] += 5.0  # the slab does not count
    assert start.rmsd(moved, positions) == pytest.approx(0.5)
    image = positions + start.frame.cell[0] - start.frame.cell[1]
    assert start.rmsd(image, positions) == pytest.approx(0.0, abs=1e-9)
    one = positions.copy()
    one[np.flatnonzero(start.frame.tags == 2)[0]] += [0.2, 0.0, 0.0]
    assert start.rmsd(one, positions) == pytest.approx(0.2 / np.sqrt(2))  # CH


def test_ends_are_stored_as_they_were_found(starts: list[Start], relaxed: Path) -> None:
    ends = read_ends(relaxed, starts, SETTINGS)
    assert ends is not None
    for start in starts:
        end = ends[start.system.sid]
        assert (end.steps, end.converged) == (4, False)
        atoms = start.atoms(end.positions)
        atoms.calc = EMT()
        assert end.energy == pytest.approx(atoms.get_potential_energy() - start.reference, abs=1e-4)
        held = start.frame.fixed
        assert np.abs(end.positions - start.frame.pos)[held].max() < 1e-6
        assert np.abs(end.positions - start.frame.pos)[~held].max() > 0.01
        first = start.atoms(start.frame.pos)
        first.calc = EMT()
        assert atoms.get_potential_energy() < first.get_potential_energy()
    assert {system.sid for system in read_index(relaxed)} == set(SYSTEMS)


def test_stored_ends_of_something_else_are_refused(starts: list[Start], relaxed: Path) -> None:
    with pytest.raises(ValueError, match=r"use --fmax 0.05 and --steps 4"):
        read_ends(relaxed, starts, RelaxationSettings(fmax=0.05, steps=9, frames="ends"))
    other = read_starts(LARGE / "test", [read_index(LARGE / "test")[5]])
    with pytest.raises(ValueError, match="does not hold"):
        read_ends(relaxed, other, SETTINGS)
    assert read_ends(relaxed.parent / "missing", starts, SETTINGS) is None


def test_a_system_in_the_basin_is_near_in_both_senses(starts: list[Start]) -> None:
    start = starts[0]
    sid = start.system.sid
    goal = {sid: End(start.frame.pos, -1.0, True, 10)}

    def row(shift: float, energy: float | None, converged: bool = True) -> dict[str, object]:
        end = {sid: End(start.frame.pos + np.array([shift, 0.0, 0.0]), -0.7, converged, 20)}
        (found,) = compare([start], end, goal, {} if energy is None else {sid: energy})
        return found

    near = row(0.1, -0.95)
    assert near["in_basin"] is True
    assert near["energy_difference_eV"] == pytest.approx(0.05)
    assert near["energy_error_eV"] == pytest.approx(0.3)
    assert row(0.1, -1.15)["in_basin"] is False  # another, lower minimum
    assert row(0.3, -0.95)["in_basin"] is False
    assert row(0.1, None)["in_basin"] is None
    lost = compare([start], {}, goal, {})[0]
    rows = [near, row(0.3, -1.25, converged=False), lost]
    summary = summarize(rows)
    assert summary["systems"] == 3
    assert summary["relaxed"] == 2
    assert summary["basin_share"] == pytest.approx(1 / 3)
    assert summary["near_share"] == pytest.approx(1 / 3)
    assert summary["converged_share"] == pytest.approx(1 / 3)
    assert summary["energy_difference_eV"] == pytest.approx((0.05 - 0.25) / 2)
    assert summary["energy_difference_size_eV"] == pytest.approx(0.15)
    assert summary["rmsd_A"] == pytest.approx(0.2)
    assert summarize([row(0.1, None), lost])["basin_share"] is None


def test_the_teacher_s_energies_are_kept(starts: list[Start], tmp_path: Path) -> None:
    ends = {start.system.sid: End(start.frame.pos, 0.0, True, 1) for start in starts}
    stored = tmp_path / "energies.json"
    assert teacher_energies(starts, ends, None, stored) == {}
    found = teacher_energies(starts, ends, EMT(), stored)
    atoms = starts[0].atoms(starts[0].frame.pos)
    atoms.calc = EMT()
    expected = atoms.get_potential_energy() - starts[0].reference
    assert found[SYSTEMS[0]] == pytest.approx(expected, abs=1e-6)
    assert teacher_energies(starts, ends, None, stored) == found


@pytest.mark.skipif(importlib.util.find_spec("sevenn") is not None, reason="the teacher is installed")
def test_command_without_the_teacher(
    folder: Path, relaxed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_tiny(tmp_path / "tiny.pt")
    arguments = [
        *("--checkpoints", str(checkpoint), "--data", str(folder), "--systems", "2", "--steps", "4"),
        *("--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "relaxations")),
    ]
    main([*arguments, "--relaxed", str(relaxed)])
    assert "pip install sevenn" in capsys.readouterr().out
    record = json.loads((tmp_path / "relaxations.json").read_text(encoding="utf-8"))
    rows = record["results"]["tiny"]["systems"]
    assert all(row["energy_difference_eV"] is None and row["rmsd_A"] > 0 for row in rows)
    # Of the starts the data know the teacher's energy.
    assert record["results"]["not relaxed"]["summary"]["energy_difference_size_eV"] > 0
    page = (tmp_path / "relaxations.md").read_text(encoding="utf-8")
    assert page == markdown(record, "relaxations.png")
    assert "energies of the ends of tiny were not computed" in page
    # What is finished is not relaxed again.
    trajectories = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.traj")}
    assert len(trajectories) == 2
    main([*arguments, "--relaxed", str(relaxed)])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.traj")} == trajectories
    again = json.loads((tmp_path / "relaxations.json").read_text(encoding="utf-8"))
    assert again["results"] == record["results"]
    with pytest.raises(ValueError, match="making the teacher's ends needs sevenn"):
        main([*arguments, "--relaxed", str(tmp_path / "nothing")])


@pytest.mark.skipif(
    not (LARGE / "relaxed/index.jsonl").exists(),
    reason="the teacher's ends are made by studies.teacher_relaxations where sevenn is installed",
)
def test_the_bundled_ends_are_of_the_default_choice() -> None:
    starts = read_starts(LARGE / "test", choose(read_index(LARGE / "test"), 20, seed=0))
    ends = read_ends(LARGE / "relaxed", starts, RelaxationSettings(fmax=0.05, steps=300, frames="ends"))
    assert ends is not None
    for start in starts:
        end = ends[start.system.sid]
        assert np.abs(end.positions - start.frame.pos)[start.frame.fixed].max() < 1e-4
        assert end.energy < start.frame.energy - start.reference + 1e-3
    assert sum(path.stat().st_size for path in (LARGE / "relaxed").iterdir()) < 300_000


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match=r"index.jsonl: no such file"):
        main(["--checkpoints", str(checkpoint), "--data", str(tmp_path)])
    with pytest.raises(ValueError, match="give 1 or more"):
        main(["--checkpoints", str(checkpoint), "--systems", "0"])

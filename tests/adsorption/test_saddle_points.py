"""Minima that are saddle points: displaced, relaxed again, replaced by what lies below."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from test_basins import slab, with_adsorbate

from equiformer2.adsorption.finished_search import FinishedSearch
from equiformer2.adsorption.saddle_points import DISPLACEMENT, RATTLE, displaced
from equiformer2.adsorption.search import SearchResult, SearchSettings, search_placements
from equiformer2.adsorption.search_output import write_search
from equiformer2.errors import InputError

TOLD = {"mode": "heuristic", "placements": 3, "seed": 0, "fmax_eV_A": 0.1, "steps": 200, "stop": True}


def search(folder: Path, sites: tuple[str, ...], **settings: int) -> SearchResult:
    base = slab(size=(2, 2, 3))
    placed = [(site, with_adsorbate(base, "O", site)) for site in sites]
    result = search_placements(base, placed, EMT(), folder, SearchSettings(0.1, 200, **settings))
    write_search(folder, result, {"calculator": "emt", "checkpoint": None}, TOLD)
    return result


@pytest.mark.parametrize("name", ["O", "CO"])
def test_a_displacement_is_small_and_its_own(name: str) -> None:
    atoms = with_adsorbate(slab(size=(2, 2, 3)), name, "bridge")
    moved = displaced(atoms, "a")
    lengths = np.linalg.norm(moved.positions - atoms.positions, axis=1)
    of_slab = lengths[: -len(name)]
    assert not of_slab.any()
    assert lengths[-len(name) :].max() < 2 * DISPLACEMENT + RATTLE + 1e-9
    assert np.array_equal(moved.positions, displaced(atoms, "a").positions)
    assert not np.allclose(moved.positions, displaced(atoms, "b").positions)
    assert not np.allclose(moved.positions, displaced(atoms, "a", seed=1).positions)
    atoms.set_constraint([*atoms.constraints, FixAtoms([len(atoms) - 1])])
    assert np.array_equal(displaced(atoms, "a").positions[-1], atoms.positions[-1])


def test_oxygen_on_a_bridge_falls_into_the_hollow(tmp_path: Path) -> None:
    """EMT's bridge on Cu(111) is a saddle point 0.03 eV above the fcc hollow; by symmetry O stays on it."""
    result = search(tmp_path / "s", ("bridge",))
    hollow = search(tmp_path / "hollow", ("fcc",))
    assert [check.fell for check in result.checks] == [True]
    assert result.energy == pytest.approx(hollow.energy, abs=3e-3)
    assert result.best.saddle_energy == pytest.approx(hollow.energy + 0.03, abs=0.01)
    assert [check.fell for check in hollow.checks] == [False]
    assert hollow.best.saddle is None
    record = json.loads((tmp_path / "s" / "search.json").read_text())
    (row,) = record["placements"]
    assert (row["checked_by"], row["basin"], row["status"]) == ("bridge.check", "bridge", "converged")
    assert row["energy_eV"] == record["adsorption_energy_eV"] < row["saddle_energy_eV"] - 0.02
    (check,) = record["saddle_check"]["checks"]
    assert check["fell"]
    evaluations = [row["model_evaluations"], check["model_evaluations"]]
    clean = json.loads((tmp_path / "s" / "relaxed.jsonl").read_text().splitlines()[0])
    assert record["model_evaluations"] == sum(evaluations) + clean["model_evaluations"]
    finished = FinishedSearch.read(tmp_path / "s")
    assert np.allclose(finished.minimum("bridge").positions, finished.best.positions, atol=1e-6)
    before = (tmp_path / "s" / "relaxed.jsonl").read_bytes()
    again = search(tmp_path / "s", ("bridge",))
    assert (tmp_path / "s" / "relaxed.jsonl").read_bytes() == before
    assert again.energy == pytest.approx(result.energy, abs=1e-9)
    assert "was on a saddle point" in (tmp_path / "s" / "report.html").read_text()


def test_the_lowest_must_survive_and_others_need_not(tmp_path: Path) -> None:
    result = search(tmp_path / "both", ("ontop", "bridge"))
    assert [(check.placement, check.fell) for check in result.checks] == [("bridge", True)]
    assert [one.id for one in result.ranking()] == ["bridge", "ontop"]
    every = search(tmp_path / "every", ("ontop", "bridge", "fcc"), check_minima=3)
    assert {"fcc": False, "bridge": True}.items() <= {one.placement: one.fell for one in every.checks}.items()
    assert every.energy == pytest.approx(result.energy, abs=5e-3)
    none = search(tmp_path / "none", ("bridge",), check_minima=0)
    assert none.checks == []
    assert none.energy > result.energy + 0.02
    with pytest.raises(InputError, match="check_minima is -1"):
        SearchSettings(check_minima=-1)

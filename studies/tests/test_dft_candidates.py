"""The study of candidates, with effective medium theory as the teacher."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

from equiformer2.adsorption.named_structures import build_slab
from equiformer2.adsorption.placements import placements
from equiformer2.inference import open_engine
from equiformer2.inference.batched import RelaxationSettings
from studies.dft_candidates import (
    ALONE,
    METHODS,
    NETWORK,
    Case,
    averages,
    by_chance,
    cases,
    equal_success,
    judge_case,
    page,
    relaxed,
    replay,
    stop_numbers,
)
from studies.study_errors import LARGE

SETTINGS = RelaxationSettings(fmax=0.1, steps=40, frames="ends")


STOPS = [
    {"placements": 40, "relaxed": 8, "missed": True, "missed_by_eV": 0.3},
    {"placements": 40, "relaxed": 40, "missed": False, "missed_by_eV": 0.0},
]


class Wrong(EMT):
    """Effective medium theory whose energies are upside down, with its forces."""

    def calculate(self, atoms: Atoms | None = None, *args: object) -> None:
        super().calculate(atoms, *args)
        self.results["energy"] = self.results["free_energy"] = -self.results["energy"]


def case(number: int = 6) -> Case:
    slab = build_slab("Cu111", (2, 2, 3))
    return Case("a", slab, [(one.id, one.atoms) for one in placements(slab, "*O", "heuristic", number, 0)])


def test_a_perfect_network_finds_it_with_one_candidate(tmp_path: Path) -> None:
    one = case()
    row = judge_case(one, open_engine(EMT()), open_engine(EMT()), SETTINGS, tmp_path, "emt")
    assert row is not None
    first = row["methods"]["1"]
    assert first["network, single point"] == (True, 1)
    assert first["network, relaxed"][0] is True
    assert 0.0 < first["teacher only"][0] <= 1.0
    assert first["lowest starts"][1] >= 6
    found = averages([row])
    assert set(found) == set(METHODS)
    assert found["network, single point"]["1"] == {"success": 1.0, "teacher_calls": 1.0}
    own = row["curves"]
    assert all(len(own[way]) == row["placements"] and own[way][-1][0] == 1.0 for way in ALONE)
    candidates = {"command": "x", "settings": {"placements": 6, "steps": 40}, "systems": [row]}
    candidates |= {"averages": found, "equal_success": equal_success([row])}
    stops = {"command": "y", "settings": {"placements": 40}, "systems": [], **stop_numbers(STOPS)}
    record = {"checkpoints": {"emt": {"candidates": candidates, "stops": stops}}}
    assert "6 placements each (`x`)" in page(record)
    assert "1 systems were stopped early, and in 1 of them (50.0% of all)" in page(record)
    assert "| network, single point | 100% |" in page(record)


def test_a_network_that_is_wrong_needs_more(tmp_path: Path) -> None:
    """Its lowest minimum is the highest one: on top, 0.16 eV above the hollows."""
    row = judge_case(case(), open_engine(EMT()), open_engine(Wrong()), SETTINGS, tmp_path, "wrong")
    assert row is not None
    success = [row["methods"][str(k)]["network, single point"][0] for k in range(1, 6)]
    assert success[0] is False
    assert success[-1] is True


def test_chance_is_counted() -> None:
    assert by_chance(-1.0, [-1.0, -0.95, -0.5], 4, 1) == pytest.approx(0.5)
    assert by_chance(-1.0, [-1.0, -0.95, -0.5], 4, 2) == pytest.approx(1 - 1 / 6)
    assert by_chance(-1.0, [-0.5], 4, 2) == 0.0
    assert by_chance(-1.0, [-1.0], 4, 9) == 1.0


def test_the_rule_of_the_search_is_replayed(tmp_path: Path) -> None:
    one = case(24)
    ends = relaxed([("clean", one.slab), *one.placed], open_engine(EMT()), SETTINGS, tmp_path)
    clean = ends.pop("clean").atoms
    row = replay(one, ends, clean)
    assert row is not None
    assert row["relaxed"] in (8, 16, 24)
    energies = np.array([ends[name].energy_eV for name, _ in one.placed])
    missed = energies.min() < energies[: row["relaxed"]].min() - 0.1
    assert row["missed"] == missed


def test_calls_for_equal_success_are_those_of_the_fewest_relaxations() -> None:
    method = {k: dict.fromkeys(METHODS, (True, 1)) for k in map(str, range(1, 6))}
    curve = [(0.5, 10.0), (0.9, 20.0), (1.0, 30.0)]
    row = {"placements": 3, "curves": dict.fromkeys(ALONE, curve), "methods": method}
    other = {**row, "methods": {k: dict.fromkeys(METHODS, (False, 1)) for k in method}}
    assert equal_success([row])[NETWORK[0]]["1"] == dict.fromkeys(ALONE, 30.0)
    assert equal_success([row, other])[NETWORK[0]]["1"] == dict.fromkeys(ALONE, 10.0)


def test_as_many_systems_as_were_asked_for() -> None:
    found = cases(LARGE / "test", 2, 1, 0)
    assert [len(one.placed) for one in found] == [1, 1]
    assert [one.sid for one in cases(LARGE / "test", 3, 1, 0)][:2] == [one.sid for one in found]

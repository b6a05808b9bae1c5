"""The study of drafts, on effective medium theory: resumed, compared, written as a page."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from equiformer2.errors import InputError
from equiformer2.inference import open_engine
from equiformer2.inference.batched import RelaxationSettings
from studies.draft_and_verify import compare, page, relax_all, rmsd, seconds_per_call

SETTINGS = RelaxationSettings(fmax=0.05, steps=60, frames="ends")


class Cheap(EMT):
    """Effective medium theory with forces that are too small."""

    calls = 0

    def calculate(self, atoms: Atoms | None = None, *args: object) -> None:
        super().calculate(atoms, *args)
        type(self).calls += 1
        self.results["forces"] = 0.8 * self.results["forces"]


def starts() -> list[tuple[str, Atoms]]:
    found = []
    for metal in ("Cu", "Ag", "Pt"):
        atoms = fcc111(metal, (2, 2, 2), vacuum=7.0, periodic=True)
        add_adsorbate(atoms, "O", 1.5, "fcc")
        atoms.set_tags([{0: 2, 1: 1, 2: 0}[tag] for tag in atoms.get_tags()])
        atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 0))
        atoms.positions[-1, :2] += 0.2
        found.append((metal, atoms))
    return found


def test_calls_saved_and_basins_changed(tmp_path: Path) -> None:
    full, draft = open_engine(EMT()), open_engine(Cheap())
    alone = relax_all(starts(), full, SETTINGS, tmp_path / "alone")
    drafted = relax_all(starts(), full, SETTINGS, tmp_path / "draft", draft)
    found = compare(alone, drafted, cost=0.25)
    assert found["relaxations"] == 3
    assert found["calls_alone"] == sum(end.model_evaluations for end in alone.values())
    assert 0 < found["calls_saved_share"] < 1
    assert found["time_saved_share"] == pytest.approx(
        1 - (found["calls_after_draft"] + 0.25 * found["draft_calls"]) / found["calls_alone"]
    )
    assert found["basins_changed"] == found["basins_changed_of_converged"] == 0
    assert found["both_converged"] == 3
    # A stopped study goes on: nothing is calculated again.
    before = Cheap.calls
    again = relax_all(starts(), full, SETTINGS, tmp_path / "draft", draft)
    assert Cheap.calls == before
    assert compare(alone, again, cost=0.25) == found
    moved = drafted["Cu"]
    moved.atoms.positions[-1, 0] += 1.0
    assert rmsd(alone["Cu"].atoms, moved.atoms) == pytest.approx(1.0, abs=0.1)
    assert moved.energy_eV is not None
    moved.energy_eV -= 0.5
    changed = compare(alone, drafted, cost=0.25)
    assert (changed["basins_changed"], changed["basins_lower"], changed["basins_higher"]) == (1, 1, 0)
    text = page(
        {
            "command": "python -m x",
            "full": "emt",
            "settings": {"fmax": 0.05, "steps": 60},
            "drafts": {"cheap": found},
        }
    )
    assert f"| cheap | 3 | {found['calls_alone']} | {found['calls_after_draft']} |" in text
    heading, rule, row = text.splitlines()[-3:]
    assert heading.count("|") == rule.count("|") == row.count("|") == 15


def test_nothing_to_compare_is_told_and_time_is_measured(tmp_path: Path) -> None:
    silicon = [("Si", Atoms("Si2", [[0, 0, 0], [0, 0, 2.2]]))]
    ends = relax_all(silicon, open_engine(EMT()), SETTINGS, tmp_path / "alone")
    with pytest.raises(InputError, match="no system is relaxed on both sides"):
        compare(ends, ends, cost=0.5)
    assert 0 < seconds_per_call(open_engine(EMT()), starts()[0][1]) < 5
    assert np.isfinite(seconds_per_call(open_engine(Cheap()), starts()[0][1]))

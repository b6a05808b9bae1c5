"""Ledgers keep what DFT was asked and what it answered, whenever the search was stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from test_basins import slab, with_adsorbate

from equiformer2.adsorption.dft_inputs import Candidate
from equiformer2.adsorption.dft_ledger import Answer, DftLedger
from equiformer2.errors import InputError


def base() -> Atoms:
    return slab(size=(2, 2, 3))


def candidate(name: str, site: str) -> Candidate:
    return Candidate(name, with_adsorbate(base(), "O", site), -1.0, 0.2)


def answer(one: Candidate, energy: float) -> Answer:
    atoms = one.atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.ones((len(atoms), 3)))
    return Answer(one.id, ("OUTCAR",), [atoms], {"functional": "PBE", "cut-off (eV)": 400.0}, "today")


def test_structures_are_asked_once(tmp_path: Path) -> None:
    ledger = DftLedger(tmp_path)
    first, second = candidate("a", "fcc"), candidate("b", "hcp")
    assert [path.name for path in ledger.ask([first], base())] == ["01", "slab"]
    (tmp_path / "dft/01/INCAR").write_text("ENCUT = 500")  # the user's own
    assert [path.name for path in DftLedger(tmp_path).ask([second, first], base())] == ["02"]
    assert (tmp_path / "dft/01/INCAR").read_text() == "ENCUT = 500"
    record = json.loads((tmp_path / "dft/ledger.json").read_text())
    assert record["open"] == ["a", "slab", "b"]
    assert {"id", "folder", "structure_sha256", "model_eV", "asked"} <= set(record["asked"][0])


def test_input_without_a_line_is_taken_up(tmp_path: Path) -> None:
    """A kill between the input and the ledger leaves a folder of which the ledger says nothing."""
    one, other = candidate("a", "fcc"), candidate("b", "hcp")
    DftLedger(tmp_path).ask([one], base())
    (tmp_path / "dft/ledger.json").unlink()
    (tmp_path / "dft/01/OUTCAR").write_text("results")
    ledger = DftLedger(tmp_path)
    ledger.ask([other, one], base())
    assert {row["id"]: row["folder"] for row in ledger.asked} == {"b": "02", "a": "01", "slab": "slab"}


def test_answers_are_kept_with_their_frames(tmp_path: Path) -> None:
    one, other = candidate("a", "fcc"), candidate("b", "hcp")
    ledger = DftLedger(tmp_path)
    ledger.ask([one, other], base())
    ledger.answer([answer(one, -10.0)])
    before = (tmp_path / "dft/ledger.json").read_bytes()
    ledger.answer([answer(other, -11.0)])
    again = DftLedger(tmp_path)
    assert {name: found.energy for name, found in again.answers.items()} == {"a": -10.0, "b": -11.0}
    assert [row["id"] for row in again.open_questions()] == ["slab"]
    frame = again.answers["a"].frames[0]
    assert np.array_equal(frame.get_tags(), one.atoms.get_tags())
    assert len(frame.constraints[0].index) == 4
    assert again.answers["a"].max_force == pytest.approx(3**0.5)
    assert again.answers["a"].settings["functional"] == "PBE"
    (tmp_path / "dft/ledger.json").write_bytes(before)  # killed before the ledger was written
    assert list(DftLedger(tmp_path).answers) == ["a"]
    (tmp_path / "dft/answers.traj").unlink()
    with pytest.raises((InputError, OSError), match=r"answers\.traj"):
        DftLedger(tmp_path)

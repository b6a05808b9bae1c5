"""Unread outputs are not computed by default, and nothing that is read changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixCom
from ase.io import read
from inference_helpers import KindedEMT
from torch_geometric.data import Batch

from datasets_oc20 import OC20Lmdb
from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor, relax
from equiformer2.model.output_request import OutputRequest
from tests.observed import Call, observed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def requests() -> Iterator[list[tuple[bool, int | None]]]:
    """For every pass: whether with energies, and the number of atoms whose forces were asked for."""
    seen: list[tuple[bool, int | None]] = []

    def note(calls: list[Call]) -> None:
        request: OutputRequest = calls[-1].arguments["self"]
        mask = request.force_atoms
        seen.append((request.energy, None if mask is None else int(mask.sum())))

    with observed(OutputRequest.check, on_call=note):
        yield seen


def test_real_structures_with_a_trained_network() -> None:
    """A genuine OC20 record, other bundled shapes: isolated atom, all atoms fixed; one batch."""
    data = OC20Lmdb(ROOT / "tests/fixtures/datasets_oc20/s2ef_val_20.lmdb")
    held = data[3].clone()
    held.fixed = torch.ones_like(held.fixed)
    lone = data[0].clone()
    for name in ("pos", "atomic_numbers", "tags", "fixed", "forces"):
        lone[name] = lone[name][-1:]
    lone.natoms, lone.pbc = 1, torch.zeros_like(lone.pbc)
    batch = Batch.from_data_list([data[0], data[19], held, lone])
    free = ~batch.fixed
    assert 0 < int(free.sum()) < len(free)
    predictor = Predictor(ROOT / "models/oc20_small.pt")
    dense = predictor.predict(batch)
    scale = float(dense["forces"].abs().max())
    for energy in (True, False):
        out = predictor.predict(batch, energy=energy, force_atoms=free)
        assert ("energy" in out) == energy
        assert float((out["forces"] - dense["forces"])[free].abs().max()) < 1e-6 * max(1.0, scale)
        assert not out["forces"][~free].any()
        if energy:
            assert torch.equal(out["energy"], dense["energy"])


def test_the_calculator_computes_everything_unless_told_otherwise(
    checkpoint: Path, oxygen_on_copper: Atoms, requests: list[tuple[bool, int | None]]
) -> None:
    oxygen_on_copper.calc = EquiformerV2Calculator(checkpoint)
    raw = oxygen_on_copper.get_forces(apply_constraint=False)
    assert (np.abs(raw).max(axis=1) > 0).all()
    assert oxygen_on_copper.get_potential_energy() != 0
    assert requests == [(True, None)]


def test_forces_on_fixed_atoms_are_zero_on_request(
    checkpoint: Path, oxygen_on_copper: Atoms, requests: list[tuple[bool, int | None]]
) -> None:
    atoms = oxygen_on_copper
    atoms.calc = EquiformerV2Calculator(checkpoint)
    dense, energy = atoms.get_forces(), atoms.get_potential_energy()
    atoms.calc = EquiformerV2Calculator(checkpoint, forces_on_fixed=False)
    np.testing.assert_allclose(atoms.get_forces(), dense, atol=1e-6)
    np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), atoms.get_forces())
    assert atoms.get_potential_energy() == energy
    assert requests[-1] == (True, 5)  # four surface atoms and the oxygen


def test_changed_constraints_are_noticed(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    atoms = oxygen_on_copper
    atoms.calc = EquiformerV2Calculator(checkpoint)
    dense = atoms.get_forces(apply_constraint=False)
    atoms.calc = EquiformerV2Calculator(checkpoint, forces_on_fixed=False)
    atoms.get_forces()
    constraints = atoms.constraints
    atoms.set_constraint()  # forces that were left out are wanted now
    np.testing.assert_allclose(atoms.get_forces(), dense, atol=1e-6)
    atoms.set_constraint(constraints)
    atoms.get_forces()
    atoms.set_constraint(FixAtoms([12]))
    np.testing.assert_allclose(atoms.get_forces()[:12], dense[:12], atol=1e-6)


def test_other_constraints_may_read_all_forces(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    atoms = oxygen_on_copper
    atoms.set_constraint([FixCom(), *atoms.constraints])
    atoms.calc = EquiformerV2Calculator(checkpoint)
    dense = atoms.get_forces()
    atoms.calc = EquiformerV2Calculator(checkpoint, forces_on_fixed=False)
    np.testing.assert_array_equal(atoms.get_forces(), dense)


def test_energies_of_every_third_call(
    checkpoint: Path, oxygen_on_copper: Atoms, requests: list[tuple[bool, int | None]]
) -> None:
    atoms = oxygen_on_copper
    atoms.calc = EquiformerV2Calculator(checkpoint, energy_every=3)
    reference = EquiformerV2Calculator(checkpoint)
    for _ in range(5):
        forces = atoms.get_forces()
        np.testing.assert_allclose(forces, reference.get_property("forces", atoms) * (forces != 0), atol=1e-6)
        atoms.rattle(0.01)
    ours = [energy for energy, _ in requests[::2]]
    assert ours == [True, False, False, True, False]
    atoms.get_forces()
    assert "energy" not in atoms.calc.results
    # Never that of an earlier structure.
    assert atoms.get_potential_energy() == pytest.approx(reference.get_potential_energy(atoms), abs=1e-6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", ["LBFGS", "FIRE", "BFGS"])
def test_relaxations_are_the_same(
    checkpoint: Path,
    oxygen_on_copper: Atoms,
    requests: list[tuple[bool, int | None]],
    optimizer: str,
    tmp_path: Path,
) -> None:
    calculator = EquiformerV2Calculator(checkpoint)
    options: dict[str, Any] = {"optimizer": optimizer, "fmax": 1e-4, "steps": 5}
    dense = relax(oxygen_on_copper, calculator, forces_on_fixed=True, **options)
    assert requests == [(True, None)] * 6
    requests.clear()
    lean = relax(oxygen_on_copper, calculator, **options)
    assert requests == [(True, 5)] * 6
    requests.clear()
    trajectory = tmp_path / "relaxation.traj"
    sparse = relax(oxygen_on_copper, calculator, energy_every=2, trajectory=trajectory, **options)
    # The last frame's energy costs a pass of its own where it was not its turn.
    assert requests == [(energy, 5) for energy in (True, False, True, False, True, False, True)]
    for result in (lean, sparse):
        np.testing.assert_allclose(result.atoms.positions, dense.atoms.positions, atol=1e-5)
        np.testing.assert_allclose(result.atoms.get_forces(), dense.atoms.get_forces(), atol=1e-5)
        assert result.energy == pytest.approx(dense.energy, abs=1e-6)
        assert result.max_forces == pytest.approx(dense.max_forces, abs=1e-5)
    assert lean.energies == pytest.approx(dense.energies, abs=1e-6)
    assert [energy is None for energy in sparse.energies] == [False, True, False, True, False, False]
    frames = read(trajectory, ":")
    assert len(frames) == 6
    assert "energy" not in frames[1].calc.results
    np.testing.assert_allclose(frames[5].get_forces(), dense.atoms.get_forces(), atol=1e-5)
    assert not lean.atoms.get_forces(apply_constraint=False)[:8].any()
    assert dense.atoms.get_forces(apply_constraint=False)[:8].any()


def test_the_calculator_is_as_before_after_a_relaxation(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    calculator = EquiformerV2Calculator(checkpoint)
    result = relax(oxygen_on_copper, calculator, steps=0, energy_every=3)
    atoms = result.atoms
    atoms.calc = calculator
    assert atoms.get_forces(apply_constraint=False)[:8].any()
    assert (calculator.forces_on_fixed, calculator.energy_every) == (True, 1)


def test_other_calculators_relax_as_ever(oxygen_on_copper: Atoms) -> None:
    calculator = KindedEMT("total")
    result = relax(oxygen_on_copper, calculator, steps=3, fmax=1e-4, energy_every=2)
    assert [energy is None for energy in result.energies] == [False, True, False, False]
    assert calculator.calls == 4


def test_wrong_settings(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    with pytest.raises(InputError, match="energy_every is 0"):
        EquiformerV2Calculator(checkpoint, energy_every=0)
    with pytest.raises(InputError, match="energy_every is 0"):
        relax(oxygen_on_copper, KindedEMT("total"), energy_every=0)

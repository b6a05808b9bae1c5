"""Molecular dynamics with gradient forces keeps its energy, with direct forces it does not."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.verlet import VelocityVerlet
from model_helpers import as_data, random_model, small_config

from equiformer2 import EquiformerV2


class Scaled(Calculator):
    """A network in float64, its energy unit chosen such that the largest force of `start` is 1 eV/Å."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, model: EquiformerV2, start: Atoms) -> None:
        super().__init__()
        self.model, self.scale = model, 1.0
        start = start.copy()
        start.calc = self
        self.scale = 1 / np.abs(start.get_forces()).max()
        self.reset()

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        with torch.no_grad():
            out = self.model(as_data(self.atoms, torch.float64))
        self.results = {
            "energy": self.scale * out["energy"].item(),
            "forces": self.scale * out["forces"].numpy(),
        }


def energies(forces: str, time_step: float, time: float = 12.0) -> tuple[np.ndarray, np.ndarray]:
    """Potential and total energies (eV) of every step of `time_step` fs."""
    model = random_model(small_config(forces=forces, max_neighbors=100, max_radius=12.0), torch.float64)
    points = 1.7 * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    atoms = Atoms("COCNO", positions=points.numpy())
    atoms.set_velocities(0.03 * np.random.default_rng(0).normal(size=(5, 3)))
    atoms.calc = Scaled(model, atoms)
    found = []

    def record() -> None:
        found.append((atoms.get_potential_energy(), atoms.get_total_energy()))

    dynamics = VelocityVerlet(atoms, timestep=time_step * units.fs)
    dynamics.attach(record)
    dynamics.run(round(time / time_step))
    potential, total = np.array(found).T
    return potential, total


@pytest.mark.slow
def test_dynamics_with_gradient_forces_keep_the_energy() -> None:
    potential, total = energies("gradient", 0.5)
    _, fine = energies("gradient", 0.25)
    _, direct = energies("direct", 0.5)
    exchanged, drift = np.ptp(potential), np.ptp(total)
    assert exchanged > 0.05, "the potential energy hardly changes"
    assert drift < 0.02 * exchanged
    # The error of velocity Verlet, quadratic in its step, is all there is.
    assert 3 < drift / np.ptp(fine) < 5
    assert np.ptp(direct) > 20 * drift

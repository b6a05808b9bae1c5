"""A relaxation that the driver steps through, so that both implementations take their steps in turn."""

from collections.abc import Iterator
from typing import Any

import torch
from ase.calculators.calculator import Calculator
from ase.optimize import FIRE

from benchmarks.benchmark_structures import load_atoms
from benchmarks.numerics import precision

# No structure of a network with random parameters converges below this: the driver decides when to stop.
NEVER = 1e-12


class Relaxation:
    """FIRE on the first slab with its lower layers held; one evaluation of the network per step."""

    def __init__(self, calculator: Calculator, precision_name: str, device: str) -> None:
        self.atoms = load_atoms()
        self.atoms.calc = calculator
        self.precision, self.device = precision_name, device
        self._steps: Iterator[Any] = FIRE(self.atoms, logfile=None).irun(fmax=NEVER, steps=10**9)

    def first_answers(self, draws: int) -> list[dict[str, torch.Tensor]]:
        """Energy (eV) and forces (eV/Å, before constraints) of the start structure, `draws` times."""
        rows = []
        for _ in range(draws):
            self.atoms.calc.reset()
            with precision(self.precision, self.device):
                forces = self.atoms.get_forces(apply_constraint=False)
            rows.append(
                {
                    "energy": torch.tensor([self.atoms.get_potential_energy()]),
                    "forces": torch.from_numpy(forces.copy()),
                }
            )
        with precision(self.precision, self.device):
            next(self._steps)  # the start structure; every further one is a step
        return rows

    def step(self) -> float:
        """Move the atoms once and evaluate; returns the energy, eV."""
        with precision(self.precision, self.device):
            next(self._steps)
        return float(self.atoms.get_potential_energy())

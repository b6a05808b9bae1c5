"""OC20's S2EF metrics, with the reference evaluator's names and definitions.

Energies in eV, forces in eV/Å. Force metrics run over free atoms only, as OC20 evaluates
(Chanussot et al. 2021, section 4; fairchem-core 1.10 `fairchem.core.modules.evaluator`).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torchmetrics import Metric

from equiformer2.graph import structure_index

#: A structure counts as solved in energy below this absolute error, eV.
ENERGY_THRESHOLD = 0.02
#: ... and in forces when no component of any free atom is off by this much, eV/Å.
FORCE_THRESHOLD = 0.03

ENERGY_METRICS = ("energy_mae", "energy_mse", "energy_within_threshold")
FORCE_METRICS = (
    "forces_mae",
    "forcesx_mae",
    "forcesy_mae",
    "forcesz_mae",
    "forces_mse",
    "forces_cosine_similarity",
    "forces_magnitude_error",
    "energy_forces_within_threshold",
)
#: Larger is better for these, smaller for all others.
HIGHER_IS_BETTER = frozenset(
    {"energy_within_threshold", "energy_forces_within_threshold", "forces_cosine_similarity"}
)


class S2EFMetrics(Metric):
    """Accumulates the S2EF metrics over batches and over DDP processes.

    `update(prediction, batch)` takes `prediction["energy"]` [B] eV and, unless `forces=False`,
    `prediction["forces"]` [N, 3] eV/Å, and reads the targets, `natoms` and `fixed` from the batch.
    `compute()` returns a dict of float64 scalars:

    - `energy_mae` eV, `energy_mse` eV²
    - `forces_mae`, `forcesx_mae`, … eV/Å and `forces_mse` (eV/Å)²: over components of free atoms
    - `forces_cosine_similarity`, `forces_magnitude_error`: means over free atoms
    - `energy_within_threshold` (EwT): share of structures with an energy error below 0.02 eV
    - `energy_forces_within_threshold` (EFwT): share that also has every force component within 0.03 eV/Å.
      A structure without free atoms is judged by its energy.

    `kwargs` go to `torchmetrics.Metric`. Sums are kept in float64 on the device; nothing waits for the
    device before `compute()`.
    """

    full_state_update = False

    energy_abs: Tensor
    energy_sq: Tensor
    energy_solved: Tensor
    structures: Tensor
    forces_abs: Tensor
    forces_sq: Tensor
    cosine: Tensor
    magnitude: Tensor
    solved: Tensor
    free_atoms: Tensor

    def __init__(self, forces: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.forces = forces
        scalars = ["energy_abs", "energy_sq", "energy_solved", "structures"]
        if forces:
            scalars += ["cosine", "magnitude", "solved", "free_atoms"]
        for name in scalars:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        if forces:
            for name in ("forces_abs", "forces_sq"):
                self.add_state(name, torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: dict[str, Tensor], batch: Data) -> None:
        """Add one batch."""
        # In float64 before the difference: both may be total energies of thousands of eV.
        energy_error = (prediction["energy"].view(-1).double() - batch.energy.view(-1).double()).abs()
        solved = energy_error < ENERGY_THRESHOLD
        self.structures += energy_error.numel()
        self.energy_abs += energy_error.sum()
        self.energy_sq += energy_error.square().sum()
        self.energy_solved += solved.sum()
        if self.forces:
            self._update_forces(prediction["forces"], batch, solved)

    def _update_forces(self, forces: Tensor, batch: Data, energy_solved: Tensor) -> None:
        # Masked, not indexed: an index would make the host wait for the device. Zeros change no sum.
        held = batch.fixed.bool()[:, None]
        predicted, target = (f.float().masked_fill(held, 0.0) for f in (forces, batch.forces))
        error = (predicted - target).abs()
        self.free_atoms += (~held).sum()
        self.forces_abs += error.double().sum(dim=0)
        self.forces_sq += error.double().square().sum(dim=0)
        self.cosine += torch.cosine_similarity(predicted, target).double().sum()
        self.magnitude += (predicted.norm(dim=-1) - target.norm(dim=-1)).abs().double().sum()
        worst = error.new_zeros(energy_solved.numel())
        structure = structure_index(batch.natoms.view(-1), len(error))
        worst.scatter_reduce_(0, structure, error.amax(dim=-1), reduce="amax")
        self.solved += (energy_solved & (worst < FORCE_THRESHOLD)).sum()

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything seen since the last `reset()`; NaN where nothing was seen."""
        values = {
            "energy_mae": self.energy_abs / self.structures,
            "energy_mse": self.energy_sq / self.structures,
            "energy_within_threshold": self.energy_solved / self.structures,
        }
        if self.forces:
            by_axis = self.forces_abs / self.free_atoms
            values |= {
                "forces_mae": by_axis.mean(),
                "forcesx_mae": by_axis[0],
                "forcesy_mae": by_axis[1],
                "forcesz_mae": by_axis[2],
                "forces_mse": self.forces_sq.sum() / (3 * self.free_atoms),
                "forces_cosine_similarity": self.cosine / self.free_atoms,
                "forces_magnitude_error": self.magnitude / self.free_atoms,
                "energy_forces_within_threshold": self.solved / self.structures,
            }
        return values


def energy_metrics(target: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """`ENERGY_METRICS` of energies at hand, both `[n]` eV."""
    error = np.abs(np.asarray(target, dtype=np.float64) - predicted)
    return {
        "energy_mae": float(error.mean()),
        "energy_mse": float(np.square(error).mean()),
        "energy_within_threshold": float((error < ENERGY_THRESHOLD).mean()),
    }

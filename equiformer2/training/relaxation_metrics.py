"""OC20's metrics of relaxations: IS2RE (relaxed energy) and IS2RS (relaxed structure).

Names and definitions are the reference evaluator's (Chanussot et al. 2021, section 4; fairchem-core 1.10
`fairchem.core.modules.evaluator`, tasks `is2re` and `is2rs`). Energies in eV, positions in Å; positions of
free atoms only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.geometry import complete_cell

from equiformer2.training.metrics import ENERGY_METRICS, energy_metrics

IS2RE_METRICS = ENERGY_METRICS
IS2RS_METRICS = ("positions_mae", "positions_mse", "positions_average_distance_within_threshold")
#: ADwT counts the systems whose mean distance lies below each of these, Å.
DISTANCE_THRESHOLDS = np.arange(0.01, 0.5, 0.001)
#: Metrics of the leaderboard that cannot be had from predictions and targets.
NEEDS_DFT = {
    "forces_below_threshold": "FbT needs a DFT single point of every relaxed structure",
    "average_forces_below_threshold": "AFbT needs a DFT single point of every relaxed structure",
}


@dataclass(frozen=True)
class PositionErrors:
    """How far one relaxed system is from its target.

    Attributes:
        components: position components of free atoms.
        absolute: sum of their absolute errors, Å. No periodic images, as in the reference.
        squared: sum of their squared errors, Å².
        distance: mean distance of free atoms to the nearest image of their targets, Å.
    """

    components: int
    absolute: float
    squared: float
    distance: float


def position_errors(
    positions: np.ndarray, target: np.ndarray, cell: np.ndarray, pbc: np.ndarray
) -> PositionErrors:
    """Errors of the n free atoms of one system.

    Args:
        positions: `[n, 3]` Å, relaxed by the model.
        target: `[n, 3]` Å, relaxed by DFT.
        cell: `[3, 3]` Å, rows are lattice vectors; those of non-periodic directions may be zero.
        pbc: `[3]` periodic directions.
    """
    error = positions - target
    cell = complete_cell(cell)
    fractional = np.linalg.solve(cell.T, error.T).T
    fractional = np.where(pbc, fractional - np.ceil(fractional - 0.5), fractional)
    distances = np.linalg.norm(fractional @ cell, axis=1)
    return PositionErrors(
        components=error.size,
        absolute=float(np.abs(error).sum(dtype=np.float64)),
        squared=float(np.square(error).sum(dtype=np.float64)),
        distance=float(distances.mean()) if len(distances) else 0.0,
    )


def is2re_metrics(target: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """`energy_mae` eV, `energy_mse` eV² and EwT of relaxed energies, both `[n]` eV."""
    return energy_metrics(target, predicted)


def is2rs_metrics(errors: Sequence[PositionErrors]) -> dict[str, float]:
    """`positions_mae` Å, `positions_mse` Å² and ADwT over systems; nothing where no atom is free.

    Average distance within threshold: the share of systems whose mean distance lies below a threshold,
    averaged over thresholds from 0.01 to 0.5 Å.
    """
    components = sum(error.components for error in errors)
    if not components:
        return {}
    distances = np.array([error.distance for error in errors])
    return {
        "positions_mae": sum(error.absolute for error in errors) / components,
        "positions_mse": sum(error.squared for error in errors) / components,
        "positions_average_distance_within_threshold": float(
            (distances[:, None] < DISTANCE_THRESHOLDS).mean()
        ),
    }

"""Displacements that break the symmetry of a relaxed adsorbate, so that it leaves a saddle point.

A start on a symmetric site has no force along the surface and may end on a saddle point, whose forces are as
small as those of a minimum. From a displaced structure a relaxation goes back into a minimum, and away from a
saddle point.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from equiformer2.adsorption.basins import SAME_ENERGY
from equiformer2.inference.atoms import ADSORBATE
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.many import Relaxation

#: Å; along the surface, and of the farthest atom by a turn.
DISPLACEMENT = 0.1
#: Å; of every atom by itself, for torsions and bends: as far as a stretched bond costs little.
RATTLE = 0.03
#: eV; a relaxation that ends lower than this has left a saddle point.
FALL = SAME_ENERGY
#: eV/Å; largest threshold of the forces, and in parts of the search's own. Near a flat saddle point, where
#: the fall to the next site is hardly `FALL`, the forces on the displaced adsorbate are hardly larger.
LARGEST_FMAX, SHARE_OF_FMAX = 0.02, 0.4


@dataclass(frozen=True)
class SaddleCheck:
    """Relaxation of a displaced minimum.

    Attributes:
        placement: id of the lowest placement or arrangement in the minimum.
        relaxation: from the displaced structure.
        before: adsorption energy of the minimum, eV.
        energy: of what it has relaxed to, eV; None if that failed.
        status: as of a placement.
    """

    placement: str
    relaxation: Relaxation
    before: float
    energy: float | None
    status: str

    @property
    def fell(self) -> bool:
        """True if it was a saddle point, and a minimum has been found from there."""
        return self.status == "converged" and self.energy is not None and self.energy < self.before - FALL

    @property
    def stays(self) -> bool:
        """True if it is a minimum; False where it was a saddle point, or the relaxation does not tell."""
        return self.status == "converged" and not self.fell

    @property
    def sentence(self) -> str:
        """Say what has come of it."""
        if self.fell:
            return (
                f"{self.placement} was on a saddle point at {self.before:.3f} eV: displaced, it relaxes to "
                f"{self.energy:.3f} eV"
            )
        if self.stays:
            return f"{self.placement} is a minimum: displaced, it relaxes to the same energy"
        return f"it is open whether {self.placement} is a minimum: displaced, it is {self.status}"

    def summary(self) -> dict[str, Any]:
        """Plain values for `search.json`."""
        return {
            "placement": self.placement,
            "checked_by": self.relaxation.id,
            "status": self.status,
            "steps": self.relaxation.steps,
            "model_evaluations": self.relaxation.model_evaluations,
            "energy_before_eV": self.before,
            "energy_eV": self.energy,
            "fell": self.fell,
            "stays": self.stays,
            "sentence": self.sentence,
        }


def check_settings(fmax: float, steps: int) -> RelaxationSettings:
    """Settings of the relaxation of a displaced minimum.

    Args:
        fmax: eV/Å; threshold with which the minimum was found.
        steps: most steps.
    """
    return RelaxationSettings(fmax=min(LARGEST_FMAX, SHARE_OF_FMAX * fmax), steps=steps)


def status_of_check(status: str, relaxation: Relaxation, fmax: float) -> str:
    """Status of a displaced minimum, by the threshold of the search and not by the check's tighter one."""
    is_enough = status == "unconverged" and (relaxation.max_force_eV_A or np.inf) < fmax
    return "converged" if is_enough else status


def displaced(
    atoms: Atoms, name: str, seed: int = 0, molecules: Sequence[Sequence[int]] | None = None
) -> Atoms:
    """Move the adsorbate (tag 2) of a relaxed structure off a symmetric place.

    It is pushed along the surface in a random direction, turned about a random axis through its centre, and
    rattled. Held atoms stay.

    Args:
        atoms: relaxed; it is not changed.
        name: of the placement; each has its own displacement, whatever else is relaxed.
        seed: random seed.
        molecules: indices of the atoms of each adsorbate, which are moved one by one; None for one of all.
    """
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    everything = atoms.positions.copy()
    groups = [np.flatnonzero(atoms.get_tags() == ADSORBATE)] if molecules is None else molecules
    for group in groups:
        chosen = np.asarray(group, dtype=int)
        everything[chosen] = _moved(atoms, everything[chosen], random)
    moved = atoms.copy()
    moved.set_positions(everything)  # with its constraints
    return moved


def _moved(atoms: Atoms, positions: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Push, turn and rattle the atoms of one molecule, `[N, 3]` Å, on the surface of `atoms`."""
    angle = random.uniform(0.0, 2.0 * np.pi)
    first = atoms.cell[0] / np.linalg.norm(atoms.cell[0])
    normal = np.cross(atoms.cell[0], atoms.cell[1])
    second = np.cross(normal / np.linalg.norm(normal), first)
    push = DISPLACEMENT * (np.cos(angle) * first + np.sin(angle) * second)
    axis = random.normal(size=3)
    turn = np.cross(axis / np.linalg.norm(axis), positions - positions.mean(axis=0))
    farthest = np.linalg.norm(turn, axis=1).max()
    if farthest > RATTLE:  # an atom alone does not turn
        turn *= DISPLACEMENT / farthest
    rattle = random.normal(size=positions.shape)
    rattle *= RATTLE / np.linalg.norm(rattle, axis=1, keepdims=True)
    return np.asarray(positions + push + turn + rattle)

"""Displacements that break the symmetry of a relaxed adsorbate, so that it leaves a saddle point.

A start on a symmetric site has no force along the surface and may end on a saddle point, whose forces are as
small as those of a minimum. From a displaced structure a relaxation goes back into a minimum, and away from a
saddle point.
"""

import zlib

import numpy as np
from ase import Atoms

from equiformer2.adsorption.basins import SAME_ENERGY
from equiformer2.inference.atoms import ADSORBATE

#: Å; along the surface, and of the farthest atom by a turn.
DISPLACEMENT = 0.1
#: Å; of every atom by itself, for torsions and bends: as far as a stretched bond costs little.
RATTLE = 0.03
#: eV; a relaxation that ends lower than this has left a saddle point.
FALL = SAME_ENERGY
#: eV/Å; largest threshold of the forces, and in parts of the search's own. Near a flat saddle point, where
#: the fall to the next site is hardly `FALL`, the forces on the displaced adsorbate are hardly larger.
LARGEST_FMAX, SHARE_OF_FMAX = 0.02, 0.4


def displaced(atoms: Atoms, name: str, seed: int = 0) -> Atoms:
    """Move the adsorbate (tag 2) of a relaxed structure off a symmetric place.

    It is pushed along the surface in a random direction, turned about a random axis through its centre, and
    rattled. Held atoms stay.

    Args:
        atoms: relaxed; it is not changed.
        name: of the placement; each has its own displacement, whatever else is relaxed.
        seed: random seed.
    """
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    moved = atoms.copy()
    chosen = np.flatnonzero(atoms.get_tags() == ADSORBATE)
    positions = atoms.positions[chosen]
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
    positions = positions + push + turn + rattle
    everything = moved.positions.copy()
    everything[chosen] = positions
    moved.set_positions(everything)  # with its constraints
    return moved

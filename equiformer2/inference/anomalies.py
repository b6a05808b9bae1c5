"""Did the relaxation keep the adsorbate what and where it was?

The rules of OC20's anomaly detection (Chanussot et al. 2021, "anomalies" in the dataset's metadata): compare
which atoms touch, by covalent radii, before and after. An energy of a system with an anomaly is not the
adsorption energy of the intended adsorbate.
"""

import numpy as np
from ase import Atoms
from ase.neighborlist import NeighborList, natural_cutoffs

from equiformer2.inference.atoms import ADSORBATE, SUBSURFACE

LOOSE = 1.5
"""OC20's wider cutoff: a contact must be gone beyond it before it counts as broken."""


def find_anomalies(initial: Atoms, final: Atoms, tags: np.ndarray) -> list[str]:
    """Sentences, one per anomaly; empty when the adsorbate is intact and bound and the slab kept its bonds.

    Args:
        initial: slab plus adsorbate before the relaxation.
        final: the same atoms after it.
        tags: `[N]` OC20 tags.
    """
    adsorbate = np.flatnonzero(tags == ADSORBATE)
    slab = np.flatnonzero(tags != ADSORBATE)
    before, after = _contacts(initial, 1.0), _contacts(final, 1.0)
    loose_before, loose_after = _contacts(initial, LOOSE), _contacts(final, LOOSE)
    found = []
    inside = np.ix_(adsorbate, adsorbate)
    if not np.array_equal(before[inside], after[inside]):
        found.append("the adsorbate has dissociated or rearranged: its internal bonds changed")
    if not loose_after[np.ix_(adsorbate, slab)].any():
        found.append("the adsorbate has desorbed: it touches no slab atom")
    if after[np.ix_(adsorbate, np.flatnonzero(tags == SUBSURFACE))].any():
        found.append("the adsorbate has moved into the slab: it touches held subsurface atoms")
    surface = np.ix_(slab, slab)
    formed = after[surface] & ~loose_before[surface]
    broken = before[surface] & ~loose_after[surface]
    if formed.any() or broken.any():
        found.append("the surface has reconstructed: bonds between slab atoms changed")
    return found


def _contacts(atoms: Atoms, factor: float) -> np.ndarray:
    """`[N, N]` bool: closer than `factor` times the sum of covalent radii, periodic images included."""
    neighbors = NeighborList(
        natural_cutoffs(atoms, mult=factor), skin=0.0, self_interaction=False, bothways=True
    )
    neighbors.update(atoms)
    return neighbors.get_connectivity_matrix(sparse=False).astype(bool)

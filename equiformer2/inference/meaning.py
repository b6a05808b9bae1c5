"""Recognise structures for which an adsorption-energy model has no answer."""

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from equiformer2.inference.atoms import ADSORBATE, oc20_tags

VACUUM = 5.0
"""Å between neighbouring layers of atoms, from which on nothing connects them."""

BOND_SKIN = 0.6
"""Å by which bonded atoms may exceed the sum of their covalent radii (ASE's natural cutoffs with skin)."""

_OC20_ADSORBATES = frozenset((1, 6, 7, 8))
"""Elements of OC20's adsorbates: H, C, N, O."""


def no_adsorption_energy(atoms: Atoms) -> str | None:
    """Name a structure that is no slab with an adsorbate ("a bulk crystal"); None for others.

    None, too, where it cannot be told: a structure without tags that may hold one of OC20's adsorbates.

    Args:
        atoms: a structure that has passed `check_atoms`.
    """

    def is_open(axis: int) -> bool:
        """Tell whether the structure ends along a lattice vector: not periodic, or a gap of `VACUUM`."""
        if not atoms.pbc[axis]:
            return True
        cell = atoms.cell.complete()
        scaled = np.sort(np.linalg.solve(cell.array.T, atoms.positions.T)[axis] % 1.0)
        gaps = np.diff(scaled, append=scaled[0] + 1.0)
        normal = np.cross(cell.array[axis - 2], cell.array[axis - 1])
        return bool(gaps.max() * abs(cell.volume) / np.linalg.norm(normal) > VACUUM)

    tags, _ = oc20_tags(atoms)
    adsorbate = tags == ADSORBATE
    open_directions = sum(map(is_open, range(3)))
    if adsorbate.any() and not adsorbate.all() and open_directions < 3:
        return None
    if open_directions == 3 or adsorbate.all():
        return "a lone atom" if len(atoms) == 1 else "a molecule or cluster without a slab"
    if open_directions == 0:
        return "a bulk crystal"
    if atoms.get_tags().any() or not _OC20_ADSORBATES & set(atoms.numbers.tolist()):
        return "a slab without an adsorbate (no atom has tag 2)"
    return None


def count_adsorbates(atoms: Atoms) -> int:
    """Number of molecules or fragments among the atoms with tag 2; images across the cell are one."""
    tags, _ = oc20_tags(atoms)
    adsorbate = atoms[tags == ADSORBATE]
    if len(adsorbate) == 0:
        return 0
    radii = covalent_radii[adsorbate.numbers]
    connected = adsorbate.get_all_distances(mic=True) < radii[:, None] + radii + BOND_SKIN
    while (wider := connected @ connected).sum() > connected.sum():
        connected = wider
    return len(np.unique(connected, axis=0))


def warning_for(atoms: Atoms, energy_kind: str) -> str | None:
    """Word the warning that a model's energy of `atoms` needs; None where it needs none."""
    if energy_kind != "adsorption":
        return None
    what = no_adsorption_energy(atoms)
    if what is not None:
        return (
            f"the structure is {what}: the model predicts adsorption energies, which only a slab with "
            "an adsorbate has, so its energy means nothing here (its forces may)"
        )
    adsorbates = count_adsorbates(atoms)
    if adsorbates > 1:
        return (
            f"the structure has {adsorbates} adsorbates or fragments (tag 2): an adsorption energy is one "
            "per structure, with the model's mean energy in it once, so the energy is neither that of one "
            "adsorbate nor the sum; OC20 has one adsorbate per cell"
        )
    return None

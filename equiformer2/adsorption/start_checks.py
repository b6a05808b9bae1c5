"""Checks of start structures, made before a relaxation costs anything."""

import itertools
from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import get_distances

from equiformer2.adsorption.anomalies import CUSHION, SKIN
from equiformer2.adsorption.named_structures import SHORTEST_BOND
from equiformer2.adsorption.periodic_images import whole_molecule, whole_slab
from equiformer2.errors import InputError
from equiformer2.inference.atoms import ADSORBATE, SUBSURFACE, check_atoms

WIDER = "--size of one built by name"
MORE_VACUUM = "--vacuum of one built by name, on either side"
"""Options that give a slab more room, for messages."""

Groups = Sequence[Sequence[int]]


def check_start(
    atoms: Atoms,
    *,
    cutoff: float | None = None,
    closest: float = SHORTEST_BOND,
    molecules: Groups | None = None,
) -> list[str]:
    """Check slab plus adsorbate before it is relaxed.

    A good start has one whole molecule that touches the surface from outside, no two atoms that are too near,
    an adsorbate that does not touch its own periodic images or, through the vacuum, the next image of the
    slab. Contacts are those of `equiformer2.adsorption.anomalies`.

    Args:
        atoms: slab plus adsorbate, with OC20 tags (2 for adsorbate atoms).
        cutoff: Å, the calculator's, which the vacuum of the slab must have; None checks contacts only.
        closest: shortest distance of an adsorbate and a slab atom, as a fraction of the sum of their covalent
            radii. OC20 places adsorbates at 1 or more; relaxed ones come nearer.
        molecules: indices of the atoms of each adsorbate, where there are several; all atoms of tag 2 are one
            molecule if None.

    Returns:
        A sentence per fault; none for a good start.
    """
    try:
        check_atoms(atoms)
    except InputError as error:
        return [str(error)]
    tags = atoms.get_tags()
    adsorbate, slab = np.flatnonzero(tags == ADSORBATE), np.flatnonzero(tags != ADSORBATE)
    if not len(adsorbate) or not len(slab):
        return ["the start needs slab and adsorbate atoms: tag the adsorbate's with 2"]
    groups = [adsorbate] if molecules is None else [np.asarray(group, dtype=int) for group in molecules]
    faults = []
    for number, group in enumerate(groups):
        name = "the adsorbate" if len(groups) == 1 else f"adsorbate {number}"
        faults += [*_Faults.pieces(atoms[group], name), *_Faults.contacts(atoms, group, slab, name, closest)]
        faults += _Faults.images(atoms[group], name)
    faults += _Faults.between_adsorbates(atoms, groups)
    faults += _Faults.vacuum(atoms, adsorbate, slab, cutoff)
    return faults


def image_contact(molecule: Atoms, name: str) -> str | None:
    """Find a contact of a molecule with its own images in the plane of its cell.

    Args:
        molecule: whole, in the cell of the slab.
        name: for the sentence.

    Returns:
        A sentence; None without a contact.
    """
    cell, positions = molecule.cell.array, molecule.positions
    radii = covalent_radii[molecule.numbers]
    reach = radii[:, None] + radii[None, :] + SKIN
    between = positions[None, :] - positions[:, None]
    farthest = float(np.linalg.norm(between, axis=2).max() + reach.max())
    # An image i lines of the lattice away is at least i times their distance away, also in a skewed cell.
    counts = molecule.pbc[:2] * (farthest * np.linalg.norm(np.linalg.pinv(cell[:2]), axis=0)).astype(int)
    for i, j in itertools.product(*(range(-count, count + 1) for count in counts)):
        shift = i * cell[0] + j * cell[1]
        if (i, j) <= (0, 0) or np.linalg.norm(shift) > farthest:
            continue  # the opposite shift has the same distances
        distance = np.linalg.norm(between + shift, axis=2)
        if (distance < reach).any():
            a, b = np.argwhere(distance < reach)[0]
            symbols = molecule.get_chemical_symbols()
            return (
                f"{name} is larger than the surface: its atom {symbols[a]} is {distance[a, b]:.2f} Å "
                f"from {symbols[b]} of its own periodic image, a contact: give a wider slab ({WIDER})"
            )
    return None


def check_vacuum(slab: Atoms, cutoff: float) -> None:
    """Raise `InputError` where the vacuum of a slab is thinner than the calculator's cutoff, Å."""
    gap = whole_slab(slab).gap
    if gap < cutoff:
        raise InputError(_Faults.thin(gap, cutoff))


class _Faults:
    """Sentences about one kind of fault each; empty lists where there is none."""

    @staticmethod
    def pieces(molecule: Atoms, name: str) -> list[str]:
        try:
            whole_molecule(molecule, name)
        except InputError as error:
            return [str(error)]
        return []

    @staticmethod
    def contacts(atoms: Atoms, group: np.ndarray, slab: np.ndarray, name: str, closest: float) -> list[str]:
        """Find faults of the distances between an adsorbate and the slab."""
        symbols = atoms.get_chemical_symbols()
        radii = covalent_radii[atoms.numbers]
        bonds = radii[group][:, None] + radii[slab][None, :]
        _, distance = get_distances(
            atoms.positions[group], atoms.positions[slab], cell=atoms.cell, pbc=atoms.pbc
        )
        ratio = distance / bonds
        a, b = np.unravel_index(int(ratio.argmin()), ratio.shape)
        if ratio[a, b] < closest - 1e-6:
            return [
                f"atom {group[a]} ({symbols[group[a]]}) of {name} is {distance[a, b]:.2f} Å from slab atom "
                f"{slab[b]} ({symbols[slab[b]]}), closer than {closest:g} times the sum of their radii "
                f"({bonds[a, b]:.2f} Å)"
            ]
        loose = distance - CUSHION * bonds - SKIN
        if loose.min() >= 0:
            return [
                f"{name} touches no atom of the slab (the nearest is {distance.min():.2f} Å away): lower it"
            ]
        held = atoms.get_tags()[slab] == SUBSURFACE
        inside = np.argwhere((distance - bonds - SKIN)[:, held] < 0)
        if len(inside):
            a, b = group[inside[0][0]], slab[held][inside[0][1]]
            return [
                f"{name} is inside the slab: its atom {a} ({symbols[a]}) touches the held subsurface atom "
                f"{b} ({symbols[b]})"
            ]
        return []

    @staticmethod
    def images(molecule: Atoms, name: str) -> list[str]:
        """Find contacts of an adsorbate with its own images in the plane."""
        try:
            whole = whole_molecule(molecule, name)
        except InputError:
            return []  # told already
        contact = image_contact(whole, name)
        return [] if contact is None else [contact]

    @staticmethod
    def between_adsorbates(atoms: Atoms, groups: Sequence[np.ndarray]) -> list[str]:
        """Find contacts between different adsorbates, periodic images included."""
        radii = covalent_radii[atoms.numbers]
        for (n, first), (m, second) in itertools.combinations(enumerate(groups), 2):
            _, distance = get_distances(
                atoms.positions[first], atoms.positions[second], cell=atoms.cell, pbc=atoms.pbc
            )
            if (distance < radii[first][:, None] + radii[second][None, :] + SKIN).any():
                return [
                    f"adsorbates {n} and {m} touch ({distance.min():.2f} Å): place fewer, or a wider slab"
                ]
        return []

    @staticmethod
    def vacuum(atoms: Atoms, adsorbate: np.ndarray, slab: np.ndarray, cutoff: float | None) -> list[str]:
        """Find an adsorbate that reaches the next image of the slab, by contact or within the cutoff."""
        try:
            clean = whole_slab(atoms[slab])
        except InputError as error:
            return [str(error)]
        if not np.isfinite(clean.gap):
            return []
        if cutoff is not None and clean.gap < cutoff:
            return [_Faults.thin(clean.gap, cutoff)]
        radii = covalent_radii[atoms.numbers]
        above = atoms.positions[adsorbate]
        heights = clean.atoms.positions[:, 2]
        # The images across the vacuum, above and below; the adsorbate is on one side of its own slab only.
        up = atoms.cell.array[2] * np.sign(atoms.cell[2, 2])
        is_top = above[:, 2].mean() > heights.mean()
        other = clean.atoms.positions + (up if is_top else -up)
        _, distance = get_distances(above, other, cell=atoms.cell, pbc=(*atoms.pbc[:2], False))
        bonds = radii[adsorbate][:, None] + radii[slab][None, :]
        nearest = float(distance.min())
        if (distance < CUSHION * bonds + SKIN).any():
            return [
                f"the adsorbate is {nearest:.2f} Å from the next image of the slab, a contact through the "
                f"vacuum of {clean.gap:.1f} Å: give more vacuum ({MORE_VACUUM})"
            ]
        return []

    @staticmethod
    def thin(gap: float, cutoff: float) -> str:
        return (
            f"the vacuum of {gap:.1f} Å is thinner than the cutoff of {cutoff:g} Å, so that the slab sees "
            f"its own image: give at least {cutoff:g} Å and the height of the adsorbate (OC20 has 20 Å; "
            "--vacuum of a slab built by name is half of it, on either side)"
        )

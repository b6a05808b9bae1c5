"""Symmetry of a slab, and placements that are copies of one another under it.

Operations are those of the slab as it was cut, with its fixed atoms as species of their own, that keep the
side of the surface. A relaxed slab has lost some of them: each is kept only if it maps the slab at hand onto
itself, atom by atom. So nothing that symmetry does not make equal is merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import spglib
from ase import Atoms
from ase.geometry import complete_cell, find_mic
from scipy.optimize import linear_sum_assignment

from equiformer2.inference.atoms import fixed_mask

#: Å; placements that operations of the slab make equal differ by rounding only.
SAME_PLACE = 0.05
#: Å; largest displacement of an atom of a relaxed slab from the image of another under an operation it keeps.
_KEPT = 0.1
_SYMPREC = 0.01
_FIXED = 1000  # added to the atomic number of fixed atoms


@dataclass(frozen=True)
class SurfaceSymmetry:
    """Operations that map a slab onto itself and keep the side of the surface.

    Attributes:
        cell: `[3, 3]` Å, rows are lattice vectors; a missing one is completed.
        pbc: `[3]`.
        rotations: `[G, 3, 3]`, in Cartesian coordinates: `x -> rotation @ x + translation`.
        translations: `[G, 3]` Å.
    """

    cell: np.ndarray
    pbc: np.ndarray
    rotations: np.ndarray
    translations: np.ndarray

    def __len__(self) -> int:
        """Count the operations; the identity is one."""
        return len(self.rotations)

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Apply every operation to positions `[n, 3]` Å: `[G, n, 3]`."""
        return np.einsum("gij,nj->gni", self.rotations, positions) + self.translations[:, None]

    def distance(self, first: Atoms, second: Atoms, limit: float = np.inf) -> float:
        """Compute how far an adsorbate is from the nearest image of another one.

        Args:
            first, second: the adsorbate atoms alone, `n` each, in any order.
            limit: Å; what is farther counts as infinitely far, which saves time.

        Returns:
            Å: the largest displacement of an atom, with each atom matched to one of its element, under the
            best operation; infinite for other elements.
        """
        if sorted(first.numbers) != sorted(second.numbers):
            return np.inf
        vectors = second.positions[None, None] - self.images(first.positions)[:, :, None]
        lengths = find_mic(vectors.reshape(-1, 3), self.cell, self.pbc)[1].reshape(vectors.shape[:3])
        lengths = np.where(first.numbers[:, None] == second.numbers, lengths, np.inf)
        # No matching is better than every atom's nearest one.
        bounds = lengths.min(axis=2).max(axis=1)
        best = np.inf
        for operation in np.argsort(bounds):
            if bounds[operation] >= min(best, limit):
                break
            best = min(best, self.matched(lengths[operation], first.numbers, second.numbers))
        return best if best <= limit else np.inf

    @staticmethod
    def matched(lengths: np.ndarray, species: np.ndarray, others: np.ndarray) -> float:
        """Match atoms one to one within each species; the longest of the chosen `lengths` `[n, n]`."""
        longest = 0.0
        for kind in np.unique(species):
            part = lengths[np.ix_(species == kind, others == kind)]
            rows, columns = linear_sum_assignment(part**2)
            longest = max(longest, float(part[rows, columns].max()))
        return longest


def surface_symmetry(slab: Atoms, present: Atoms | None = None) -> SurfaceSymmetry:
    """Find the operations of a slab that keep the side of its surface.

    Args:
        slab: clean slab as it was cut; surface towards positive third lattice direction.
        present: the same slab as it is now, such as relaxed, atoms in the same order; operations that do not
            map it onto itself are left out.

    Returns:
        At least the identity.
    """
    cell = complete_cell(slab.cell.array)
    species = slab.numbers + _FIXED * fixed_mask(slab)
    fractional = np.linalg.solve(cell.T, slab.positions.T).T
    crystal = cell.tolist(), fractional.tolist(), species.tolist()
    found = spglib.get_symmetry(crystal, symprec=_SYMPREC, is_magnetic=False)
    rotations, translations = [np.eye(3)], [np.zeros(3)]
    moved = slab if present is None else present
    for turn, shift in zip(
        *((found["rotations"], found["translations"]) if found else ((), ())), strict=True
    ):
        if turn[2].tolist() != [0, 0, 1] or abs(shift[2] - round(shift[2])) > _SYMPREC:
            continue  # it turns the slab over, or moves it along its normal
        rotation = cell.T @ turn @ np.linalg.inv(cell.T)
        translation = np.array([shift[0], shift[1], 0.0]) @ cell
        if np.allclose(rotation, rotations[0]) and np.allclose(translation, 0.0):
            continue
        image = moved.positions @ rotation.T + translation
        vectors = (moved.positions[None] - image[:, None]).reshape(-1, 3)
        lengths = find_mic(vectors, cell, slab.pbc)[1].reshape(len(slab), len(slab))
        if SurfaceSymmetry.matched(lengths, species, species) < _KEPT:
            rotations.append(rotation)
            translations.append(translation)
    return SurfaceSymmetry(cell, slab.pbc.copy(), np.array(rotations), np.array(translations))


def merge_copies(adsorbates: Sequence[Atoms], symmetry: SurfaceSymmetry) -> list[int]:
    """Group placements that are copies of one another.

    Two groups become one only if all their members are copies of each other, the nearest ones first, so the
    groups do not depend on the order of the placements and never chain.

    Args:
        adsorbates: the adsorbate atoms of every placement.
        symmetry: of the slab that all of them are on.

    Returns:
        For each placement the number of the first one of its group.
    """
    count = len(adsorbates)
    near = np.full((count, count), np.inf)
    for i in range(count):
        for j in range(i):
            near[i, j] = near[j, i] = symmetry.distance(adsorbates[i], adsorbates[j], SAME_PLACE)
    return complete_linkage(near, SAME_PLACE)


def complete_linkage(distances: np.ndarray, tolerance: float) -> list[int]:
    """Group items all of which are within `tolerance` of each other, nearest groups first.

    Args:
        distances: `[n, n]`, symmetric; infinite for items that never belong together.
        tolerance: largest distance within a group.

    Returns:
        For each item the number of the first one of its group.
    """
    groups = [[item] for item in range(len(distances))]
    while len(groups) > 1:
        farthest = np.array(
            [[distances[np.ix_(a, b)].max() if a is not b else np.inf for b in groups] for a in groups]
        )
        first, second = np.unravel_index(int(farthest.argmin()), farthest.shape)
        if not farthest[first, second] <= tolerance:
            break
        merged = sorted(groups[first] + groups[second])
        groups = [group for place, group in enumerate(groups) if place not in (first, second)] + [merged]
    first_of = {item: group[0] for group in groups for item in group}
    return [first_of[item] for item in range(len(distances))]

"""The neighbour search: all pairs that can matter, from the library `vesin`."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from vesin import NeighborList

from equiformer2.graph.truncation import DEGENERACY_TOLERANCE

FIRST_CUTOFF = 3.0
"""Å per cube root of a neighbour: the first search reaches 8.1 Å for 20 neighbours (docs/graph.md)."""

_CUTOFF_MARGIN = 1e-6
"""Å. vesin leaves out pairs at exactly the cutoff, the reference keeps them."""


class Pairs(NamedTuple):
    """P ordered pairs of atoms; every pair occurs in both directions."""

    target: NDArray[np.int64]
    """`[P]` atom i in the batch."""
    source: NDArray[np.int64]
    """`[P]` atom j in the batch."""
    shifts: NDArray[np.int32]
    """`[P, 3]` lattice vectors to add to `pos[source] - pos[target]`."""
    distance: NDArray[np.float64]
    """`[P]` Å."""


class Wrapped(NamedTuple):
    """Positions of N atoms moved into the cells of their structures."""

    positions: NDArray[np.float64]
    """`[N, 3]` Å, `given - cell_of_atom @ cell`."""
    cell_of_atom: NDArray[np.int32]
    """`[N, 3]` lattice vectors between this and the position as given; 0 along axes that are not periodic."""


def wrap(
    positions: NDArray[np.float64],
    cells: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    structure: NDArray[np.int64],
) -> Wrapped:
    """Move positions into the cell along its periodic directions.

    Args:
        positions: `[N, 3]` Å.
        cells: `[B, 3, 3]` Å, rows are lattice vectors; rows of non-periodic axes are not used.
        pbc: `[B, 3]`.
        structure: `[N]` index of the structure of each atom.
    """
    lattices = cells * pbc[:, :, None]
    # Coordinates along the periodic lattice vectors; across them nothing wraps.
    fractional = np.einsum("nx,nxa->na", positions, np.linalg.pinv(lattices)[structure])
    cell_of_atom = np.floor(fractional)
    moved = np.einsum("na,nax->nx", cell_of_atom, lattices[structure])
    return Wrapped(positions - moved, cell_of_atom.astype(np.int32))


def find_pairs(
    wrapped: Wrapped,
    cells: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    natoms: NDArray[np.int64],
    *,
    max_radius: float,
    max_neighbors: int,
) -> Pairs:
    """Find every pair within `max_radius`, or fewer where no other can pass the rule of `max_neighbors`.

    Args:
        wrapped: the positions, see `wrap`. Shifts are for the positions before they were wrapped.
        cells: `[B, 3, 3]` Å, rows are lattice vectors; rows of non-periodic axes are not used.
        pbc: `[B, 3]`.
        natoms: `[B]`.
        max_radius: cutoff in Å, inclusive.
        max_neighbors: the nearest neighbours of each atom that will be kept.
    """
    positions, cell_of_atom = wrapped
    parts = []
    first = 0
    for cell, periodic, atoms in zip(cells, pbc, natoms.tolist(), strict=True):
        if atoms:
            pairs = _search(positions[first : first + atoms], cell, periodic, max_radius, max_neighbors)
            parts.append(Pairs(pairs.target + first, pairs.source + first, pairs.shifts, pairs.distance))
        first += atoms
    if not parts:
        index = np.zeros(0, dtype=np.int64)
        return Pairs(index, index, np.zeros((0, 3), dtype=np.int32), np.zeros(0))
    pairs = (
        parts[0]
        if len(parts) == 1
        else Pairs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    )
    moved = cell_of_atom[pairs.target] - cell_of_atom[pairs.source]
    return pairs._replace(shifts=pairs.shifts + moved)


def _search(
    positions: NDArray[np.float64],
    cell: NDArray[np.float64],
    periodic: NDArray[np.bool_],
    max_radius: float,
    max_neighbors: int,
) -> Pairs:
    """Search one structure, with a shorter cutoff first when that is likely to be enough."""

    def within(cutoff: float) -> Pairs:
        # One thread: small structures gain nothing from more, and the order of the pairs stays the same.
        search = NeighborList(cutoff=cutoff + _CUTOFF_MARGIN, full_list=True, n_threads=1)
        indices, shifts, distance = search.compute(positions, cell, periodic, "PSd", copy=False)
        near = distance <= cutoff
        # Indexing copies: the arrays above are views of memory that belongs to `search`.
        indices = indices[near].astype(np.int64)
        return Pairs(indices[:, 0], indices[:, 1], shifts[near], distance[near])

    cutoff = FIRST_CUTOFF * max_neighbors ** (1 / 3)
    if cutoff < max_radius:
        pairs = within(cutoff)
        # Exact if the shell kept behind neighbour k + 1 in the non-strict rule lies inside the cutoff too,
        # for every atom. The strict rule and its ties need less.
        near = pairs.distance**2 <= cutoff**2 - DEGENERACY_TOLERANCE
        if np.bincount(pairs.target[near], minlength=len(positions)).min() > max_neighbors:
            return pairs
    return within(max_radius)

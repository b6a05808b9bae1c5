"""Search neighbours on the device of the positions, in plain torch, for the small structures of a batch.

All structures of a batch are searched together, so that the host waits for the device once and not for each.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equiformer2.graph.nonblocking import numbers_of, to_device

MAX_CANDIDATES = 2 * 10**8
"""Pairs of atoms and images to look at in one structure; beyond, cell lists (`search`) are better."""

_CANDIDATES_AT_A_TIME = 2 * 10**7


class DevicePairs(NamedTuple):
    """P ordered pairs of atoms on the device, as `search.Pairs`."""

    target: Tensor
    """`[P]` int64 atom i in the batch."""
    source: Tensor
    """`[P]` int64 atom j in the batch."""
    shifts: Tensor
    """`[P, 3]` int32 lattice vectors to add to `pos[source] - pos[target]`."""
    distance: Tensor
    """`[P]` Å, float64."""
    closest: float
    """The smallest distance, Å, known to the host; infinite without pairs."""


class _Piece(NamedTuple):
    """Some images of one structure, each with all pairs of atoms."""

    structure: int
    first_atom: int
    atoms: int
    first_image: int  # in the table of all structures
    images: int
    home: int  # which of them is no image but the structure itself; may be none of them

    @property
    def candidates(self) -> int:
        return self.images * self.atoms**2


def find_pairs_on_device(
    positions: Tensor,
    structure: Tensor,
    cells: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    natoms: list[int],
    max_radius: float,
) -> DevicePairs | None:
    """Find every pair within `max_radius`, as `search.find_pairs` does.

    All images in reach are tried, so the work grows with the square of the number of atoms. The host waits
    for the device once for every 2e7 candidates, so mostly once.

    Args:
        positions: `[N, 3]` Å, float64, on the device.
        structure: `[N]` structure of each atom, on the device.
        cells: `[B, 3, 3]` Å, rows are lattice vectors; rows of non-periodic axes are not used.
        pbc: `[B, 3]`.
        natoms: atoms of every structure.
        max_radius: Å, inclusive.

    Returns:
        The pairs, or None if a structure has more than `MAX_CANDIDATES`.
    """
    device = positions.device
    own_lattices = cells * pbc[:, :, None]
    # Coordinates along the periodic lattice vectors; across them nothing wraps.
    own_inverses = np.linalg.pinv(own_lattices)
    per_height = np.linalg.norm(own_inverses, axis=1)
    reach = np.where(pbc, np.ceil(max_radius * per_height), 0.0).astype(np.int64).tolist()
    images = [math.prod(2 * r + 1 for r in along) for along in reach]
    if any(n * n * count > MAX_CANDIDATES for n, count in zip(natoms, images, strict=True)):
        return None
    lattices, inverses = to_device(torch.from_numpy(np.stack((own_lattices, own_inverses))), device)
    cell_of_atom = torch.floor(torch.bmm(positions.unsqueeze(1), inverses[structure])).squeeze(1)
    wrapped = positions - torch.bmm(cell_of_atom.unsqueeze(1), lattices[structure]).squeeze(1)
    # All `[S, 3]` images in reach along each axis, structure after structure.
    axes = [[torch.arange(-n, n + 1, dtype=torch.int32, device=device) for n in along] for along in reach]
    shifts = torch.cat([torch.cartesian_prod(*each) for each in axes]) if axes else None
    found = [
        _pairs_of(pieces, wrapped, cell_of_atom, lattices, shifts, max_radius)
        for pieces in _groups(natoms, images)
        if shifts is not None
    ]
    if not found:
        index = torch.zeros(0, dtype=torch.int64, device=device)
        none = index.new_zeros(0, 3, dtype=torch.int32)
        return DevicePairs(index, index, none, positions.new_zeros(0), math.inf)
    if len(found) == 1:
        return found[0]
    target, source, shift, distance = (torch.cat(column) for column in list(zip(*found, strict=True))[:4])
    return DevicePairs(target, source, shift, distance, min(pairs.closest for pairs in found))


def _pairs_of(
    pieces: list[_Piece],
    wrapped: Tensor,
    cell_of_atom: Tensor,
    lattices: Tensor,
    shifts: Tensor,
    max_radius: float,
) -> DevicePairs:
    distance = wrapped.new_empty(sum(piece.candidates for piece in pieces))
    parts = distance.split([piece.candidates for piece in pieces])
    for piece, part in zip(pieces, parts, strict=True):
        own = wrapped[piece.first_atom : piece.first_atom + piece.atoms]
        some = shifts[piece.first_image : piece.first_image + piece.images]
        offsets = (some.to(own.dtype) @ lattices[piece.structure])[:, None, None]
        vectors = own.unsqueeze(0) - own.unsqueeze(1)
        part = part.view(piece.images, piece.atoms, piece.atoms)
        torch.linalg.vector_norm(vectors + offsets, dim=-1, out=part)
        if 0 <= piece.home < piece.images:
            part[piece.home].fill_diagonal_(torch.inf)
    near = distance <= max_radius
    # The only time the host waits: for how many there are and, for the check of the input, the smallest.
    count, closest = torch.stack((near.sum().double(), distance.min())).tolist()
    candidate = numbers_of(near, int(count))
    sizes = [(p.candidates, p.first_atom, p.atoms, p.first_image) for p in pieces]
    candidates, first_atom, atoms, first_image = to_device(torch.tensor(sizes).T.contiguous(), near.device)
    end = candidates.cumsum(0)
    piece_of = torch.searchsorted(end, candidate, right=True)
    within, atoms = candidate - (end - candidates)[piece_of], atoms[piece_of]
    source = within % atoms
    target = within // atoms % atoms
    image = within // (atoms * atoms) + first_image[piece_of]
    source, target = source + first_atom[piece_of], target + first_atom[piece_of]
    # For the positions as given: what wrapping moved comes back.
    moved = (cell_of_atom[target] - cell_of_atom[source]).to(torch.int32)
    return DevicePairs(target, source, shifts[image] + moved, distance[candidate], closest)


def _groups(natoms: list[int], images: list[int]) -> Iterator[list[_Piece]]:
    """Split all candidates into groups of at most `_CANDIDATES_AT_A_TIME`, or of a single image.

    Args:
        natoms: number of atoms of every structure.
        images: number of images of every structure.
    """
    group: list[_Piece] = []
    candidates = first_atom = first_image = 0
    for structure, (atoms, count) in enumerate(zip(natoms, images, strict=True)):
        size = max(1, _CANDIDATES_AT_A_TIME // (atoms * atoms)) if atoms else 1
        for start in range(0, count if atoms else 0, size):
            # The images are symmetric about the one in the middle.
            some, home = min(size, count - start), count // 2 - start
            piece = _Piece(structure, first_atom, atoms, first_image + start, some, home)
            if group and candidates + piece.candidates > _CANDIDATES_AT_A_TIME:
                yield group
                group, candidates = [], 0
            group.append(piece)
            candidates += piece.candidates
        first_atom, first_image = first_atom + atoms, first_image + count
    if group:
        yield group

"""The neighbour search where the positions are: plain torch, for the small structures of a GPU's batch."""

import math

import torch
from torch import Tensor

MAX_CANDIDATES = 2 * 10**8
"""Pairs of atoms and images to look at in one structure; beyond, cell lists (`search`) are better."""

_CANDIDATES_AT_A_TIME = 2 * 10**7


def find_pairs_on_device(
    positions: Tensor, cells: Tensor, pbc: Tensor, natoms: list[int], max_radius: float
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Every pair within `max_radius`, as `search.find_pairs` finds them.

    All images in reach are tried, so the work grows with the square of the number of atoms.

    Args:
        positions: `[N, 3]` Å, float64.
        cells: `[B, 3, 3]` Å, float64, rows are lattice vectors; rows of non-periodic axes are not used.
        pbc: `[B, 3]` bool.
        natoms: atoms of every structure.
        max_radius: Å, inclusive.

    Returns:
        target `[P]`, source `[P]`, shifts `[P, 3]` int32 and distances `[P]` (Å), or None if a structure has
        more than `MAX_CANDIDATES`.
    """
    lattices = cells * pbc.unsqueeze(2)
    # Coordinates along the periodic lattice vectors; across them nothing wraps.
    inverses = torch.linalg.pinv(lattices)
    heights = torch.linalg.vector_norm(inverses, dim=1).reciprocal()
    reach = torch.where(pbc, torch.ceil(max_radius / heights), torch.zeros_like(heights)).long().tolist()
    if any(
        n * n * math.prod(2 * r + 1 for r in images) > MAX_CANDIDATES
        for n, images in zip(natoms, reach, strict=True)
    ):
        return None
    found, first = [], 0
    for number, (atoms, images) in enumerate(zip(natoms, reach, strict=True)):
        own = positions[first : first + atoms]
        cell_of_atom = torch.floor(own @ inverses[number])
        wrapped = own - cell_of_atom @ lattices[number]
        shifts = _shifts(images, positions.device)
        vectors = wrapped.unsqueeze(0) - wrapped.unsqueeze(1)
        size = max(1, _CANDIDATES_AT_A_TIME // max(1, atoms * atoms))
        for some in shifts.split(size):
            offsets = (some.to(vectors.dtype) @ lattices[number])[:, None, None]
            distance = torch.linalg.vector_norm(vectors + offsets, dim=-1)
            near = distance <= max_radius
            near &= (some != 0).any(1)[:, None, None] | ~torch.eye(
                atoms, dtype=torch.bool, device=positions.device
            )
            image, target, source = near.nonzero(as_tuple=True)
            # For the positions as given: what wrapping moved comes back.
            moved = (cell_of_atom[target] - cell_of_atom[source]).to(torch.int32)
            found.append(
                (target + first, source + first, some[image] + moved, distance[image, target, source])
            )
        first += atoms
    if not found:
        index = torch.zeros(0, dtype=torch.int64, device=positions.device)
        return index, index, index.new_zeros(0, 3, dtype=torch.int32), positions.new_zeros(0)
    target, source, shift, distance = (torch.cat(column) for column in zip(*found, strict=True))
    return target, source, shift, distance


def _shifts(reach: list[int], device: torch.device) -> Tensor:
    """All `[S, 3]` int32 images up to `reach` along each axis."""
    axes = [torch.arange(-n, n + 1, dtype=torch.int32, device=device) for n in reach]
    return torch.cartesian_prod(*axes)

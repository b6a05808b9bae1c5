"""The `max_neighbors` rule of the reference (fairchem-core 1.10.0, `get_max_neighbors_mask`)."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equiformer2.graph.nonblocking import numbers_of, to_device

DEGENERACY_TOLERANCE = 0.01
"""Å^2, added to the squared distance of neighbour k + 1 by the non-strict rule (the reference's constant)."""

TIE_TOLERANCE = 1e-5
"""Å. Distances of symmetric neighbours scatter by about 1e-6 Å in float32 positions of a usual slab, by
1e-14 Å in float64. Positions in float32 far from the origin have a larger tolerance (`radius_graph`)."""

# No symmetric pair of lattice vectors has equal projections on a direction without rational relations.
_TIE_DIRECTION = (2.0**0.5 / 10.0**0.5, 3.0**0.5 / 10.0**0.5, 5.0**0.5 / 10.0**0.5)

GRID = 2.0**-30
"""Å, 1e-9: differences below it are rounding errors of positions in float64."""

_KEY_BITS = 40


def nearest_edges(
    target: Tensor,
    distance: Tensor,
    vectors_of: Callable[[Tensor], Tensor],
    num_atoms: int,
    *,
    max_neighbors: int,
    strict: bool,
    tie_tolerance: NDArray[np.float64] | None = None,
) -> Tensor:
    """Choose the edges that each atom keeps, sorted by target.

    Strict: the `max_neighbors` nearest. Edges within `tie_tolerance` of the last one kept are tied with
    it; of those, the ones with the smallest projection on a fixed direction stay, so that the choice does not
    change with the numbering of the atoms, the origin or the periodic images chosen.

    Not strict: an atom with more than `max_neighbors` neighbours keeps those with
    d^2 <= d_{k+1}^2 + `DEGENERACY_TOLERANCE`, where d_{k+1} is its distance number `max_neighbors` + 1; that
    is at least one edge more than the strict rule.

    Args:
        target: `[P]` receiving atom of each candidate.
        distance: `[P]` float64, Å.
        vectors_of: gives the vectors `[T, 3]` (float64, Å) of the candidates with the numbers `[T]`.
        num_atoms: N.
        tie_tolerance: `[N]` Å, of each receiving atom; None for `TIE_TOLERANCE`.

    Returns:
        `[E]` numbers of the candidates that stay.
    """
    order = torch.argsort(_sort_key(target, distance), stable=True)
    if not len(order):
        return order
    target, distance = target[order], distance[order]
    # Not counted by bins, whose number a GPU would have to tell the host.
    atoms = torch.arange(num_atoms, device=target.device)
    first = torch.searchsorted(target, atoms)
    counts = torch.searchsorted(target, atoms, right=True) - first
    rank = torch.arange(len(order), device=order.device) - first[target]
    crowded = counts > max_neighbors
    # Distances of neighbours k and k + 1; for an atom that is not crowded some other's, which is not used.
    last_kept, first_left = (
        distance[(first + k).clamp(max=len(order) - 1)] for k in (max_neighbors - 1, max_neighbors)
    )
    if not strict:
        limit = torch.where(crowded, first_left.square() + DEGENERACY_TOLERANCE, torch.inf)
        stays = distance.square() <= limit[target]
        return order[numbers_of(stays, int(stays.sum()))]
    near: float | Tensor = TIE_TOLERANCE
    near_edge: float | Tensor = TIE_TOLERANCE
    if tie_tolerance is not None:
        near = to_device(torch.from_numpy(tie_tolerance), distance.device)
        near_edge = near[target]
    any_tie = (crowded & (first_left - last_kept <= near)).any()
    limit = torch.where(crowded & any_tie, last_kept, torch.inf)
    ties, stays = (distance - limit[target]).abs() <= near_edge, rank < max_neighbors
    # The only time the host waits for the device.
    num_tied, num_staying = torch.stack((ties.sum(), stays.sum())).tolist()
    if num_tied:
        tied = numbers_of(ties, num_tied)
        projection = vectors_of(order[tied]) @ to_device(
            torch.tensor(_TIE_DIRECTION, dtype=distance.dtype), distance.device
        )
        # The tied edges of an atom stand together, so sorting them by atom first leaves the others in place.
        order[tied] = order[tied[torch.argsort(_sort_key(target[tied], projection), stable=True)]]
    return order[numbers_of(stays, num_staying)]


def sorted_edges(
    edges: Tensor, target: Tensor, distance: Tensor, vectors_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sort `edges` `[E]`, numbers of candidates, into an order that no rounding error changes.

    Sums over an atom's edges then have the same bits wherever the structure stands. Arguments as for
    `nearest_edges`.

    Returns:
        `[E]`, sorted by target, then by distance, then by projection on a fixed direction; values count in
        steps of `GRID`.
    """
    projection = vectors_of(edges) @ to_device(
        torch.tensor(_TIE_DIRECTION, dtype=distance.dtype), distance.device
    )
    edges = edges[torch.argsort(_sort_key(target[edges], projection), stable=True)]
    return edges[torch.argsort(_sort_key(target[edges], distance[edges]), stable=True)]


def _sort_key(target: Tensor, value: Tensor) -> Tensor:
    """One integer per edge that sorts by target, then by `value` (below 500 Å in size) in steps of `GRID`.

    An integer, so that an atom's edges are ordered alike wherever its structure stands in a batch.
    """
    return (target << _KEY_BITS) + torch.round(value / GRID).to(torch.int64)

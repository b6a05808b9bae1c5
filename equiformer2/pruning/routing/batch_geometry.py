"""What routers know of a batch before the first block: tags, held atoms, distances; all invariant."""

import dataclasses
from functools import cached_property

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph, structure_index

ADSORBATE = 2
FAR = 10.0
"""Å. Distances are cut off here: nothing farther is told apart, and nothing farther is searched."""
_SOFTNESS = 0.2
"""Å. Width of the smooth minimum: with it distances are differentiable where the nearest atom changes."""
_BEND = 0.5
"""Å. On either side of `FAR`, where distances bend to it."""
_CHUNK = 4_000_000


@dataclasses.dataclass(frozen=True)
class BatchGeometry:
    """The structures of one batch.

    Attributes:
        pos: `[N, 3]` Å.
        cell, pbc: `[B, 3, 3]` Å and `[B, 3]`.
        numbers: `[N]` atomic numbers.
        tags: `[N]` 0 subsurface, 1 surface, 2 adsorbate.
        free: `[N]` bool: not held in place.
        structure: `[N]` index of each atom's structure.
        natoms: `[B]`.
        graph: the edges of the network.
    """

    pos: Tensor
    cell: Tensor
    pbc: Tensor
    numbers: Tensor
    tags: Tensor
    free: Tensor
    structure: Tensor
    natoms: Tensor
    graph: RadiusGraph

    @classmethod
    def from_batch(cls, batch: Batch | Data, graph: RadiusGraph) -> "BatchGeometry":
        """Of a batch and its edges; without `fixed` all atoms are free.

        Raises:
            InputError: the batch has no `tags`.
        """
        if "tags" not in batch or batch.tags is None:
            raise InputError(
                "routing needs `tags` (0 subsurface, 1 surface, 2 adsorbate), which the batch lacks"
            )
        pos = batch.pos
        natoms = torch.as_tensor(batch.natoms, device=pos.device).reshape(-1)
        fixed = batch.fixed if "fixed" in batch and batch.fixed is not None else torch.zeros_like(batch.tags)
        dtype = graph.vectors.dtype  # the network's; positions may have more digits
        return cls(
            pos.to(dtype),
            batch.cell.view(-1, 3, 3).to(dtype),
            batch.pbc.view(-1, 3),
            batch.atomic_numbers.long(),
            batch.tags.long(),
            ~fixed.bool(),
            structure_index(natoms, len(pos)),
            natoms,
            graph,
        )

    @cached_property
    def context(self) -> Tensor:
        """`[N]` bool: held atoms with tag 0. All others are read out or move."""
        return (self.tags == 0) & ~self.free

    @cached_property
    def to_adsorbate(self) -> Tensor:
        """`[N]` Å to the nearest adsorbate atom, at most `FAR`, which also stands for "there is none"."""
        return self.distance_to(self.tags == ADSORBATE)

    @cached_property
    def to_free(self) -> Tensor:
        """`[N]` Å to the nearest atom that is free, at most `FAR`."""
        return self.distance_to(self.free)

    def distance_to(self, members: Tensor) -> Tensor:
        """`[N]` smooth minimum of the distances to `members` (bool `[N]`) and their images; 0 for members."""
        out = []
        for index, here in enumerate(torch.split(torch.arange(len(self.pos)), self.natoms.tolist())):
            here = here.to(self.pos.device)
            inside = members[here]
            far = self.pos.new_full((len(here),), FAR)
            if bool(inside.any()):
                pos = self.pos[here]
                to_member = _distances(pos, pos[inside], self.cell[index], self.pbc[index])
                far = torch.where(inside, torch.zeros_like(to_member), to_member)
            out.append(far)
        return torch.cat(out)

    def rank(self, scores: Tensor, tolerance: float = 1e-4) -> Tensor:
        """`[N]` rank of each score in its structure over its number of atoms, ties averaged; 1 is the top."""
        groups = tie_groups(scores, self.structure, tolerance)
        _, start, size = group_places(groups, self.structure, self.natoms)
        return 1 - (start + 0.5 * size)[groups] / self.natoms[self.structure]


def tie_groups(scores: Tensor, structure: Tensor, tolerance: float = 1e-4) -> Tensor:
    """`[N]` number of the tie group of each atom; scores nearer than `tolerance` (relative) share a group.

    Groups are numbered by structure and, within, from the highest score down.
    """
    if not len(scores):
        return structure.new_zeros(0)
    scores = scores.detach()
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(structure[order], stable=True)]
    sorted_scores, of = scores[order], structure[order]
    gap = sorted_scores[:-1] - sorted_scores[1:]
    size = torch.maximum(sorted_scores[:-1].abs(), sorted_scores[1:].abs())
    new = (gap > tolerance * size + 1e-9) | (of[1:] != of[:-1])
    numbers = torch.cat((new.new_zeros(1, dtype=torch.long), new.long().cumsum(0)))
    groups = torch.empty_like(numbers)
    groups[order] = numbers[: len(order)]
    return groups


def group_places(groups: Tensor, structure: Tensor, natoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per group: its structure, how many atoms of that come before it, its own number of atoms."""
    size = torch.bincount(groups)
    of = torch.zeros_like(size).index_copy(0, groups, structure)
    ends = size.cumsum(0)
    start = ends - size - (natoms.cumsum(0) - natoms)[of]
    return of, start, size


def group_means(scores: Tensor, groups: Tensor) -> Tensor:
    """`scores` with each replaced by the mean of its tie group, so that ties are equal to the last bit."""
    size = torch.bincount(groups)
    sums = scores.new_zeros(len(size)).index_add(0, groups, scores)
    return (sums / size)[groups]


def _distances(pos: Tensor, others: Tensor, cell: Tensor, pbc: Tensor) -> Tensor:
    """`[n]` smooth minimum over `others` and their periodic images, at most `FAR`."""
    lattice = torch.where(pbc[:, None], cell, torch.zeros_like(cell))
    vectors = others[None] - pos[:, None]
    heights = _heights(cell, pbc)
    if bool(pbc.any()):
        # Whole lattice vectors only: no derivative is lost by rounding.
        fractional = vectors.detach() @ _inverse(cell, pbc)
        vectors = vectors - torch.round(torch.where(pbc, fractional, 0.0)) @ lattice
    near = _images(torch.where(pbc, 1, 0), lattice)
    reach = (vectors.detach()[:, :, None] + near).norm(dim=3).amin(dim=(1, 2)).amax().clamp(max=FAR + _BEND)
    count = torch.where(pbc, torch.ceil((reach + 20 * _SOFTNESS) / heights + 0.5), 0.0).long()
    total = None
    images = _images(count, lattice)
    for part in images.split(max(1, _CHUNK // max(1, 3 * len(pos) * len(others)))):
        distance = (vectors[:, :, None] + part).square().sum(3).clamp(min=1e-12).sqrt()
        here = torch.logsumexp(-distance.flatten(1) / _SOFTNESS, dim=1)
        total = here if total is None else torch.logaddexp(total, here)
    assert total is not None
    return _at_most_far(-_SOFTNESS * total)


def _at_most_far(distance: Tensor) -> Tensor:
    """`distance` up to `FAR` - `_BEND`, `FAR` from `FAR` + `_BEND` on, once continuously differentiable."""
    bend = ((distance - FAR) / (2 * _BEND) + 0.5).clamp(0.0, 1.0)
    return distance.clamp(0.0, FAR - _BEND) + 2 * _BEND * (bend - 0.5 * bend * bend)


def _images(count: Tensor, lattice: Tensor) -> Tensor:
    """`[images, 3]` sums of up to `count` lattice vectors either way."""
    steps = [torch.arange(-n, n + 1, device=lattice.device) for n in count.tolist()]
    return torch.cartesian_prod(*steps).to(lattice) @ lattice


def _complete(cell: Tensor, pbc: Tensor) -> Tensor:
    """Lattice vectors with those of non-periodic axes replaced by unit vectors out of the others' span."""
    axes = pbc.nonzero().flatten().tolist()
    if len(axes) == 3:
        return cell
    rest = torch.linalg.svd(cell[axes], full_matrices=True)[2][len(axes) :] if axes else torch.eye(3).to(cell)
    full = cell.clone()
    full[[axis for axis in range(3) if axis not in axes]] = rest
    return full


def _inverse(cell: Tensor, pbc: Tensor) -> Tensor:
    return torch.linalg.inv(_complete(cell.detach(), pbc))


def _heights(cell: Tensor, pbc: Tensor) -> Tensor:
    """`[3]` Å between the lattice planes of each axis."""
    return 1 / _inverse(cell, pbc).norm(dim=0)

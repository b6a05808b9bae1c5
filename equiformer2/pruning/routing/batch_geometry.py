"""Invariant geometry of a batch for routers: tags, held atoms and distances between groups of atoms."""

import dataclasses
from functools import cached_property

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph, structure_index
from equiformer2.pruning.routing.score_selection import group_places, tie_groups

ADSORBATE = 2
FAR = 10.0
"""Distances are cut off here, Å: nothing farther is told apart, and nothing farther is searched."""
_SOFTNESS = 0.2
"""Width of the smooth minimum, Å: distances stay differentiable where the nearest atom changes."""
_BEND = 0.5
"""Range on either side of `FAR`, Å, in which distances bend to it."""
_CHUNK = 4_000_000
"""Most numbers of one tensor of distances."""


@dataclasses.dataclass(frozen=True)
class BatchGeometry:
    """Structures of one batch.

    Attributes:
        pos: `[N, 3]` Å.
        cell: `[B, 3, 3]` Å lattice vectors as rows.
        pbc: `[B, 3]` bool.
        numbers: `[N]` atomic numbers.
        tags: `[N]` 0 subsurface, 1 surface, 2 adsorbate.
        free: `[N]` bool: not held in place.
        structure: `[N]` index of each atom's structure.
        natoms: `[B]` number of atoms per structure.
        graph: edges of the network.
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
        """Take the geometry from a batch and its edges; without `fixed` all atoms are free.

        Args:
            batch: structures with `tags`.
            graph: their edges, whose precision the geometry gets.

        Returns:
            The geometry.

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
        """Held atoms with tag 0, bool `[N]`; all others are read out or move."""
        return (self.tags == 0) & ~self.free

    @cached_property
    def to_adsorbate(self) -> Tensor:
        """Distance to the nearest adsorbate atom, `[N]` Å; `FAR` beyond that and where there is none."""
        return self.distance_to(self.tags == ADSORBATE)

    @cached_property
    def to_free(self) -> Tensor:
        """Distance to the nearest free atom, `[N]` Å; `FAR` beyond that and where there is none."""
        return self.distance_to(self.free)

    def distance_to(self, members: Tensor) -> Tensor:
        """Return the smooth minimum of the distances to some atoms and their periodic images.

        Args:
            members: bool `[N]`.

        Returns:
            `[N]` Å, 0 for members and at most `FAR`.
        """
        out = []
        for index, here in enumerate(torch.split(torch.arange(len(self.pos)), self.natoms.tolist())):
            here = here.to(self.pos.device)
            inside = members[here]
            far = self.pos.new_full((len(here),), FAR)
            if bool(inside.any()):
                pos = self.pos[here]
                to_member = nearest_distances(pos, pos[inside], self.cell[index], self.pbc[index])
                far = torch.where(inside, torch.zeros_like(to_member), to_member)
            out.append(far)
        return torch.cat(out)

    def rank(self, scores: Tensor, tolerance: float = 1e-4) -> Tensor:
        """Rank scores within each structure.

        Args:
            scores: `[N]`.
            tolerance: relative difference up to which two scores are tied.

        Returns:
            `[N]` rank over the number of atoms, from 0 to 1 (top), ties averaged.
        """
        groups = tie_groups(scores, self.structure, tolerance)
        _, start, size = group_places(groups, self.structure, self.natoms)
        return 1 - (start + 0.5 * size)[groups] / self.natoms[self.structure]


def nearest_distances(pos: Tensor, others: Tensor, cell: Tensor, pbc: Tensor) -> Tensor:
    """Return the smooth minimum of the distances to other atoms and their periodic images.

    Once continuously differentiable: the minimum is soft, and distances bend to `FAR` around it.

    Args:
        pos: `[n, 3]` Å.
        others: `[m, 3]` Å, at least one.
        cell: `[3, 3]` Å lattice vectors as rows.
        pbc: `[3]` bool.

    Returns:
        `[n]` Å, at most `FAR`.
    """
    lattice = torch.where(pbc[:, None], cell, torch.zeros_like(cell))
    inverse = _inverse_cell(cell.detach(), pbc)
    heights = 1 / inverse.norm(dim=0)  # Å between the lattice planes of each axis
    vectors = others[None] - pos[:, None]

    def images(count: Tensor) -> Tensor:
        """`[images, 3]` sums of up to `count` lattice vectors either way."""
        steps = [torch.arange(-n, n + 1, device=lattice.device) for n in count.tolist()]
        return torch.cartesian_prod(*steps).to(lattice) @ lattice

    if bool(pbc.any()):
        # Whole lattice vectors only: no derivative is lost by rounding.
        fractional = vectors.detach() @ inverse
        vectors = vectors - torch.round(torch.where(pbc, fractional, 0.0)) @ lattice
    near = images(torch.where(pbc, 1, 0))
    reach = (vectors.detach()[:, :, None] + near).norm(dim=3).amin(dim=(1, 2)).amax().clamp(max=FAR + _BEND)
    count = torch.where(pbc, torch.ceil((reach + 20 * _SOFTNESS) / heights + 0.5), 0.0).long()
    total = None
    for part in images(count).split(max(1, _CHUNK // max(1, 3 * len(pos) * len(others)))):
        distance = (vectors[:, :, None] + part).square().sum(3).clamp(min=1e-12).sqrt()
        here = torch.logsumexp(-distance.flatten(1) / _SOFTNESS, dim=1)
        total = here if total is None else torch.logaddexp(total, here)
    assert total is not None
    distance = -_SOFTNESS * total
    bend = ((distance - FAR) / (2 * _BEND) + 0.5).clamp(0.0, 1.0)
    return distance.clamp(0.0, FAR - _BEND) + 2 * _BEND * (bend - 0.5 * bend * bend)


def _inverse_cell(cell: Tensor, pbc: Tensor) -> Tensor:
    """Inverse lattice, with unit vectors out of the others' span in place of non-periodic axes."""
    axes = pbc.nonzero().flatten().tolist()
    if len(axes) < 3:
        rest = torch.eye(3).to(cell)
        if axes:
            rest = torch.linalg.svd(cell[axes], full_matrices=True)[2][len(axes) :]
        cell = cell.clone()
        cell[[axis for axis in range(3) if axis not in axes]] = rest
    return torch.linalg.inv(cell)

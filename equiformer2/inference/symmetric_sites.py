"""Sites of high symmetry, at which a network with a neighbour limit and layer norms gives odd forces.

Two things happen there (docs/model.md, "Perfect crystals"): the neighbour limit keeps some of several neighbours at
the same distance, which breaks the symmetry of the site, and where symmetry makes an atom's tensors vanish, the
layer norms enlarge what rounding has left of them.
"""

from dataclasses import dataclass

import torch
from e3nn import o3
from torch_geometric.data import Data

from equiformer2.graph import radius_graph
from equiformer2.model import ModelConfig

TIED_A = 1e-4
"""Å. Neighbours nearer to each other in distance than this may change places by a touch."""

VANISHING = 1e-3
"""Sum of spherical harmonics over the neighbours, over their number, below which symmetry must have made it."""


@dataclass(frozen=True)
class SymmetricSites:
    """Counts of atoms at sites of high symmetry.

    Attributes:
        atoms: number of atoms of the structure.
        tied: atoms whose last neighbour within the limit is as far as the first one beyond it.
        vanishing: atoms whose neighbours cancel in every degree from 1 to the network's lmax.
    """

    atoms: int
    tied: int
    vanishing: int

    @property
    def notice(self) -> str | None:
        """One sentence for structures where that matters, None for others.

        Some atoms tie or have neighbours that cancel in nearly every slab, where it does little; most of them
        do in perfect crystals.
        """
        reasons = []
        if 2 * self.tied > self.atoms:
            reasons.append(f"{self.tied} of {self.atoms} atoms have equally far neighbours at the neighbour limit")
        if 2 * self.vanishing > self.atoms:
            reasons.append(f"the neighbours of {self.vanishing} of {self.atoms} atoms cancel by symmetry")
        if not reasons:
            return None
        return (
            f"perfect crystal: {' and '.join(reasons)}; forces that symmetry makes zero may come out as tenths of "
            "an eV/Å and energies jump by tens of meV between nearly equal structures: displace the atoms "
            "by 0.01 Å (atoms.rattle(0.01)) and compare structures with the same displacements"
        )


def find_symmetric_sites(data: Data, config: ModelConfig) -> SymmetricSites:
    """Count the atoms of one structure at sites where the answers of a network are least certain.

    Args:
        data: `pos [N, 3]` Å, `cell [1, 3, 3]` Å, `pbc [1, 3]`.
        config: neighbour limit, radius and lmax of the network.

    Raises:
        InputError: the graph refuses the structure (see `radius_graph`).
    """
    atoms, limit = len(data.pos), config.max_neighbors
    graph = radius_graph(
        data.pos,
        data.cell.view(1, 3, 3),
        data.pbc.view(1, 3),
        torch.tensor([atoms]),
        max_radius=config.max_radius,
        max_neighbors=limit + 1,
        strict=True,
    )
    target, distances = graph.edge_index[1], graph.distances.double()
    first = torch.searchsorted(target, torch.arange(atoms))
    rank = torch.arange(len(target)) - first[target]
    beyond = torch.nonzero(rank == limit).flatten()
    tied = distances[beyond] - distances[beyond - 1] <= TIED_A
    kept = rank < limit
    harmonics = o3.spherical_harmonics(
        list(range(1, config.lmax + 1)), graph.vectors[kept].double(), normalize=True, normalization="norm"
    )
    weights = torch.exp(-distances[kept] / config.max_radius).unsqueeze(1)
    sums = harmonics.new_zeros(atoms, harmonics.shape[1]).index_add(0, target[kept], weights * harmonics)
    size = weights.new_zeros(atoms, 1).index_add(0, target[kept], weights)
    # An atom without neighbours has no tensors that could be enlarged.
    vanishing = (size[:, 0] > 0) & (sums.norm(dim=1) <= VANISHING * size[:, 0])
    ties = int(tied.sum()) if config.enforce_max_neighbors_strictly else 0
    return SymmetricSites(atoms, ties, int(vanishing.sum()))

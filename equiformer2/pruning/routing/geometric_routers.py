"""Routers whose scores depend on the structure alone: FTP's static order and the baselines."""

import math
from typing import Any

import torch
from torch import Tensor

from equiformer2.model.routing import BlockState
from equiformer2.pruning.routing.batch_geometry import ADSORBATE, FAR, BatchGeometry
from equiformer2.pruning.routing.router import Levels, ScoreRouter
from equiformer2.values import Whole

_CYCLES = 30.0
MOST_STATIC = 4.0
"""The highest `static_priority`, that of the adsorbate."""


def static_priority(geometry: BatchGeometry) -> Tensor:
    """Score atoms by FTP's static order (arXiv 2412.11494), translated to adsorbed molecules.

    Adsorbate (4), other free atoms (3 to 4), atoms of the surface (2 to 3), all else (1 to 2). Within the
    second and third class atoms near the adsorbate come first, in the last one those near a free atom.

    Args:
        geometry: geometry of the batch.

    Returns:
        `[N]` scores.
    """
    near_adsorbate = 1 - geometry.to_adsorbate / FAR
    score = 1 + (1 - geometry.to_free / FAR)
    score = torch.where(geometry.tags == 1, 2 + near_adsorbate, score)
    score = torch.where(geometry.free, 3 + near_adsorbate, score)
    return torch.where(geometry.tags == ADSORBATE, torch.full_like(score, MOST_STATIC), score)


class StaticRouter(ScoreRouter):
    """FTP's static router: adsorbate, free atoms, surface, subsurface by distance to the free ones.

    The original keeps the first and the latest tokens; on a slab the atoms that are read are at one end, too.
    """

    def scores_of(self, block: int) -> int:
        """Return 0: the scores are the same in all blocks."""
        return 0

    def scores(self, geometry: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """Return `static_priority`."""
        return static_priority(geometry)


class DistanceRouter(ScoreRouter):
    """Baseline: nearest to the adsorbate first; 1 at the adsorbate, 0 from `FAR` on."""

    def scores_of(self, block: int) -> int:
        """Return 0: the scores are the same in all blocks."""
        return 0

    def scores(self, geometry: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """Return 1 at the adsorbate, falling to 0 at the distance `FAR`."""
        return 1 - geometry.to_adsorbate / FAR


class DegreeRouter(ScoreRouter):
    """Baseline: atoms that are a source for many others first.

    Outgoing edges are weighted by (1 + cos(π d / FAR)) / 2, so that one at the cutoff does not count. (The
    number of incoming edges is the same for all atoms where neighbours are limited.)
    """

    def scores_of(self, block: int) -> int:
        """Return 0: the scores are the same in all blocks."""
        return 0

    def scores(self, geometry: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """Return the weighted number of outgoing edges."""
        graph = geometry.graph
        weight = 0.5 * (1 + torch.cos(math.pi * graph.distances.clamp(max=FAR) / FAR))
        return weight.new_zeros(len(geometry.pos)).index_add(0, graph.edge_index[0], weight)


class RandomRouter(ScoreRouter):
    """Baseline: a random function of the surroundings of each atom, in [0, 1].

    Drawn by seed and block. A function of the surroundings rather than of the atom's number: it does not
    depend on the order of atoms or on the rest of the batch, and equivalent atoms stay together.

    Args:
        levels: levels of the blocks, see `ScoreRouter`.
        seed: random seed.
        **options: options of `ScoreRouter`.
    """

    def __init__(self, levels: Levels, seed: int = 0, **options: Any) -> None:
        super().__init__(levels, **options)
        self.seed = Whole(0, 2**40).read(seed, "seed")

    def scores_of(self, block: int) -> int:
        """Return the block: each draws its own scores."""
        return block

    def scores(self, geometry: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """Return a random function of the surroundings, drawn by seed and block."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + state.block)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64).to(geometry.pos.device)

        graph, by_element, by_distance = geometry.graph, draw(128, 4), draw(4)
        source, target = graph.edge_index
        near = torch.exp(-graph.distances.double()[:, None] / (1 + by_distance))
        terms = near * by_element[geometry.numbers[source] % 128]
        sums = terms.new_zeros(len(geometry.pos), 4).index_add(0, target, terms)
        phase = _CYCLES * ((sums @ draw(4)) + by_element[geometry.numbers % 128, 0])
        return (0.5 + 0.5 * torch.sin(phase)).to(geometry.pos.dtype)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this router again."""
        return super().settings() | {"seed": self.seed}

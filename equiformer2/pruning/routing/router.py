"""What all routers have in common: scores of atoms, block by block, and a level to cut them at."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.model.output_request import OutputRequest
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.routing.batch_geometry import ADSORBATE, BatchGeometry
from equiformer2.pruning.routing.score_selection import check_mode, select
from equiformer2.values import Number, Switch, shown

_ABOVE_ALL = 1e6
_MOST_LEVEL = 1e30

Levels = float | Sequence[float | None]
"""One level for every block that is not protected, or one per block (None: all atoms)."""


class BaseRouter(ABC):
    """A rule for what each block computes; call it like the network, `router(model, batch)`."""

    @abstractmethod
    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> "BaseRouting":
        """Decisions for one batch, see `model.routing.Router`."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What makes this router again, as JSON can hold it (see `files`)."""

    def __call__(
        self,
        model: EquiformerV2,
        batch: Batch | Data,
        graph: RadiusGraph | None = None,
        request: OutputRequest | None = None,
    ) -> dict[str, Tensor]:
        """`model`'s energies and forces with this routing; arguments as of the network."""
        return model(batch, graph=graph, active=self, request=request)


class BaseRouting(ABC):
    """Decisions for one batch.

    Attributes:
        previous: decisions of an earlier call on the same structures, for hysteresis; None at first.
    """

    observes_attention: bool = False
    previous: Sequence[Decision] | None = None

    @abstractmethod
    def decide(self, state: BlockState) -> Decision:
        """The decision for block `state.block`."""

    def before(self, block: int) -> Tensor | None:
        """Mask of the atoms that this block computed in `previous`, None for all."""
        atoms = None if self.previous is None else self.previous[block].atoms
        return None if atoms is None else atoms > 0


class ScoreRouter(BaseRouter):
    """Atoms with the highest scores are computed.

    Args:
        levels: fraction to skip (`topk`) or score to pass (`threshold`, `smooth`); one for all blocks but the
            protected ones, or one per block.
        mode: `topk`, `threshold` or `smooth` (see `selection`).
        width: of the gates of `smooth`, in units of the score.
        hysteresis: bonus of atoms that were computed before, in units of the score (see `frozen`).
        protect_ends: compute all atoms in the first and in the last block when `levels` is one number.
        keep_free: always compute free atoms and the adsorbate, whatever their scores; in the mode `topk` the
            others share what is left of the budget.
    """

    observes_attention = False

    def __init__(
        self,
        levels: Levels,
        mode: str = "topk",
        width: float = 0.1,
        hysteresis: float = 0.0,
        protect_ends: bool = True,
        keep_free: bool = False,
    ) -> None:
        check_mode(mode, width)
        if not isinstance(levels, Real | list | tuple) or isinstance(levels, bool):
            raise InputError(f"the levels are {shown(levels)}: give a number, or a number or null per block")
        self.levels: float | tuple[float | None, ...] = (
            levels
            if isinstance(levels, float)
            else float(Number().read(levels, "levels"))
            if isinstance(levels, Real)
            else tuple(levels)
        )
        self.mode, self.width = mode, float(width)
        self.hysteresis = Number(0.0).read(hysteresis, "hysteresis")
        self.protect_ends = Switch().read(protect_ends, "protect_ends")
        self.keep_free = Switch().read(keep_free, "keep_free")
        for level in (self.levels,) if isinstance(self.levels, float) else self.levels:
            if level is not None and (
                not isinstance(level, Real) or isinstance(level, bool) or not abs(level) < _MOST_LEVEL
            ):
                raise InputError(
                    f"a level is {shown(level)}: give a finite number, or null to compute all atoms"
                )
            if mode == "topk" and level is not None and not 0 <= level <= 1:
                raise InputError(f"a level is {level}: in the mode topk it is a fraction from 0 to 1")

    @abstractmethod
    def scores(self, system: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """`[N]`, higher is more important. Intensive and invariant, equal for equivalent atoms.

        `level` is that of the block, for routers whose scores depend on it.
        """

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> "ScoreRouting":
        """See `BaseRouter`."""
        return ScoreRouting(self, BatchGeometry.from_batch(batch, graph), self.of_blocks(num_blocks))

    def of_blocks(self, num_blocks: int) -> tuple[float | None, ...]:
        """Level of every block, None where all atoms are computed."""
        return spread(self.levels, num_blocks, self.protect_ends)

    def decide(
        self, system: BatchGeometry, state: BlockState, level: float, before: Tensor | None
    ) -> Decision:
        """The decision of a block that is not protected."""
        return Decision(self.choose(self.scores(system, state, level), system, level, before))

    def choose(
        self, scores: Tensor, system: BatchGeometry, level: float, before: Tensor | None = None
    ) -> Tensor:
        """Mask or gates `[N]` by scores."""
        options = self.mode, level, self.width, before, self.hysteresis
        if not self.keep_free:
            return select(scores, system.structure, system.natoms, *options)
        kept = system.free | (system.tags == ADSORBATE)
        first = torch.where(kept, torch.full_like(scores, _ABOVE_ALL), scores)
        chosen = select(first, system.structure, system.natoms, *options)
        return torch.where(kept, torch.ones_like(chosen), chosen)

    def settings(self) -> dict[str, Any]:
        """See `BaseRouter`."""
        levels = self.levels if isinstance(self.levels, float) else list(self.levels)
        return {
            "levels": levels,
            "mode": self.mode,
            "width": self.width,
            "hysteresis": self.hysteresis,
            "protect_ends": self.protect_ends,
            "keep_free": self.keep_free,
        }


class ScoreRouting(BaseRouting):
    """The decisions of a `ScoreRouter` for one batch."""

    def __init__(self, router: ScoreRouter, system: BatchGeometry, levels: Sequence[float | None]) -> None:
        self.router, self.system, self.levels = router, system, levels
        self.observes_attention = router.observes_attention

    def decide(self, state: BlockState) -> Decision:
        """The decision for block `state.block`."""
        level = self.levels[state.block]
        if level is None:
            return Decision()
        return self.router.decide(self.system, state, level, self.before(state.block))


def spread(
    levels: float | Sequence[float | None], num_blocks: int, protect_ends: bool
) -> tuple[float | None, ...]:
    """Level of every block.

    Raises:
        InputError: there is one level per block, but of another number of blocks.
    """
    if isinstance(levels, float):
        ends = (0, num_blocks - 1) if protect_ends else ()
        return tuple(None if block in ends else levels for block in range(num_blocks))
    if len(levels) != num_blocks:
        raise InputError(f"the router has levels for {len(levels)} blocks but the network has {num_blocks}")
    return tuple(levels)

"""Base classes of routers: scores of atoms, block by block, and a level to cut them at."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any, Self

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
    """Rule for the atoms and edges that each block computes.

    Call it like the network, `router(model, batch)`, or pass it on, `model(batch, active=router)`.
    """

    @property
    def abrupt(self) -> bool:
        """True if the selection can change at once while atoms move, so that forces jump."""
        return True

    @property
    def changes_structure(self) -> bool:
        """True if the network runs on other structures, for which it was trained, and never on whole ones."""
        return False

    @abstractmethod
    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> "BaseRouting":
        """Begin the decisions for one batch (`model.routing.Router`).

        Args:
            batch: structures.
            graph: their edges.
            num_blocks: number of blocks of the network.

        Returns:
            Decisions, block after block.

        Raises:
            InputError: the batch lacks something that the router needs, or the network has another number
                of blocks.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this router again, as JSON can hold them (`router_files`)."""

    def __call__(
        self,
        model: EquiformerV2,
        batch: Batch | Data,
        graph: RadiusGraph | None = None,
        request: OutputRequest | None = None,
    ) -> dict[str, Tensor]:
        """Run `model` with this routing.

        Args:
            model: the network.
            batch: structures.
            graph: their edges; None to find them.
            request: outputs that are wanted; None for all.

        Returns:
            `energy [B]` and `forces [N, 3]`, in normalised units.
        """
        return model(batch, graph=graph, active=self, request=request)


class BaseRouting(ABC):
    """Decisions for one batch.

    Attributes:
        observes_attention: True if decisions need the attention weights of the block before.
        previous: decisions of an earlier call on the same structures, for hysteresis; None at first.
    """

    observes_attention: bool = False
    previous: Sequence[Decision] | None = None

    @abstractmethod
    def decide(self, state: BlockState) -> Decision:
        """Decide for block `state.block`; blocks are asked in their order."""

    def before(self, block: int) -> Tensor | None:
        """Return the mask of the atoms that `block` computed in `previous`; None for all."""
        atoms = None if self.previous is None else self.previous[block].atoms
        return None if atoms is None else atoms > 0


class ScoreRouter(BaseRouter):
    """Router that computes the atoms with the highest scores.

    Args:
        levels: fraction to skip (`topk`) or score to pass (`threshold`, `smooth`); one for all blocks but the
            protected ones, or one per block.
        mode: `topk`, `threshold` or `smooth` (see `score_selection`).
        width: width of the gates of `smooth`, in units of the score.
        hysteresis: bonus of atoms that were computed before, in units of the score (see `frozen_plan`).
        protect_ends: compute all atoms in the first and in the last block when `levels` is one number.
        keep_free: always compute free atoms and the adsorbate, whatever their scores; in the mode `topk` the
            others share the rest of the budget.

    Raises:
        InputError: an argument that is out of its range.
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

    @property
    def abrupt(self) -> bool:
        """True unless gates open and close smoothly."""
        return self.mode != "smooth"

    @abstractmethod
    def scores(self, geometry: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """Score the atoms of a batch; intensive and invariant, equal for equivalent atoms.

        Args:
            geometry: geometry of the batch.
            state: features and attention before the block.
            level: level of the block, for routers whose scores depend on it.

        Returns:
            `[N]`, higher is more important.
        """

    def scores_of(self, block: int) -> int | None:
        """Return a number that blocks with equal scores share, or None for scores that depend on features.

        With a number, decisions are about atoms alone and follow from the structure without a network.
        """
        return None

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> "ScoreRouting":
        """Begin the decisions for one batch; its geometry is taken once."""
        return ScoreRouting(self, BatchGeometry.from_batch(batch, graph), self.block_levels(num_blocks))

    def block_levels(self, num_blocks: int) -> tuple[float | None, ...]:
        """Return the level of every block, None where all atoms are computed.

        Raises:
            InputError: there is one level per block, but of another number of blocks.
        """
        return levels_per_block(self.levels, num_blocks, self.protect_ends)

    def with_levels(self, levels: Levels, **changes: Any) -> Self:
        """Return the same router with other levels.

        Args:
            levels: one level for all blocks that are not protected, or one per block.
            **changes: other arguments to change.
        """
        levels = levels if isinstance(levels, int | float) else list(levels)
        return type(self)(**self.settings() | {"levels": levels} | changes)

    def decide(
        self, geometry: BatchGeometry, state: BlockState, level: float, before: Tensor | None
    ) -> Decision:
        """Decide for a block that is not protected.

        Args:
            geometry: geometry of the batch.
            state: features and attention before the block.
            level: level of the block.
            before: mask of the atoms that it computed in an earlier call; None for none.

        Returns:
            Mask or gates of atoms or edges.
        """
        return Decision(self.choose(self.scores(geometry, state, level), geometry, level, before))

    def choose(
        self, scores: Tensor, geometry: BatchGeometry, level: float, before: Tensor | None = None
    ) -> Tensor:
        """Select atoms by scores in the mode of this router.

        Args:
            scores: `[N]`.
            geometry: geometry of the batch.
            level: level of the block.
            before: mask of the atoms that were computed in an earlier call; None for none.

        Returns:
            Mask (bool) or gates, `[N]`.
        """
        options = self.mode, level, self.width, before, self.hysteresis
        if not self.keep_free:
            return select(scores, geometry.structure, geometry.natoms, *options)
        kept = geometry.free | (geometry.tags == ADSORBATE)
        first = torch.where(kept, torch.full_like(scores, _ABOVE_ALL), scores)
        chosen = select(first, geometry.structure, geometry.natoms, *options)
        return torch.where(kept, torch.ones_like(chosen), chosen)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this router again."""
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
    """Decisions of a `ScoreRouter` for one batch.

    Args:
        router: the router.
        geometry: geometry of the batch.
        levels: level of every block; None where all atoms are computed.
    """

    def __init__(self, router: ScoreRouter, geometry: BatchGeometry, levels: Sequence[float | None]) -> None:
        self.router, self.geometry, self.levels = router, geometry, levels
        self.observes_attention = router.observes_attention

    def decide(self, state: BlockState) -> Decision:
        """Decide for block `state.block`; all atoms where there is no level."""
        level = self.levels[state.block]
        if level is None:
            return Decision()
        return self.router.decide(self.geometry, state, level, self.before(state.block))


def levels_per_block(
    levels: float | Sequence[float | None], num_blocks: int, protect_ends: bool
) -> tuple[float | None, ...]:
    """Write out the level of every block.

    Args:
        levels: one level for all blocks, or one per block.
        num_blocks: number of blocks.
        protect_ends: compute all atoms in the first and in the last block if there is one level for all.

    Returns:
        One level per block; None where all atoms are computed.

    Raises:
        InputError: there is one level per block, but of another number of blocks.
    """
    if isinstance(levels, float):
        ends = (0, num_blocks - 1) if protect_ends else ()
        return tuple(None if block in ends else levels for block in range(num_blocks))
    if len(levels) != num_blocks:
        raise InputError(f"the router has levels for {len(levels)} blocks but the network has {num_blocks}")
    return tuple(levels)

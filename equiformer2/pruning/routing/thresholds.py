"""Conversion of a router's levels from fractions to thresholds of its score."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.routing.router import BaseRouter, BaseRouting, ScoreRouter
from equiformer2.pruning.routing.zero_tprune import AtomPruner, redundancy

AnyRouter = TypeVar("AnyRouter", bound=ScoreRouter)


@torch.no_grad()
def with_thresholds(
    router: AnyRouter, model: EquiformerV2, batches: Sequence[Batch], mode: str = "threshold", **changes: Any
) -> AnyRouter:
    """Make the same router with thresholds in place of budgets.

    The threshold of a block is the quantile of the scores there at its fraction, over the atoms of all
    calibration structures; with `smooth`, the middle of the gates lies there. An `AtomPruner` gets its
    similarity threshold in the same way. (Of an `FTPRouter`, whose levels stay fractions, only the mode
    changes.)

    Args:
        router: in the mode `topk`.
        model: the network; it runs with the budgets, block after block.
        batches: calibration structures without labels.
        mode: `threshold` or `smooth`.
        **changes: other options of the router to change, for instance `width`.

    Returns:
        A router of the same class in the new mode.

    Raises:
        InputError: the router is not in the mode `topk`, or there are no batches.
    """
    if router.mode != "topk":
        raise InputError(
            f"the router is in the mode {router.mode!r}: thresholds are found from budgets (topk)"
        )
    if not batches:
        raise InputError("thresholds need at least one calibration batch")
    settings = router.settings() | {"mode": mode} | changes
    fractions = router.block_levels(len(model.blocks))
    if hasattr(router, "cut"):
        return type(router)(**settings | {"levels": fractions})
    collected = _ScoreCollector(router, len(model.blocks))
    for batch in batches:
        model(batch, active=collected)
    middle = settings["width"] / 2 if mode == "smooth" else 0.0
    levels: list[float | None] = []
    for fraction, scores in zip(fractions, collected.scores, strict=True):
        if fraction is None:
            levels.append(None)
            continue
        importance = fraction
        if isinstance(router, AtomPruner):
            # Atoms that the similarity stage skips cannot be skipped by importance again.
            similar = router.similar * fraction
            importance = (fraction - similar) / max(1 - similar, 1e-9)
        levels.append(float(torch.cat(scores).double().quantile(importance)) - middle)
    settings["levels"] = levels
    if isinstance(router, AtomPruner) and router.similar > 0:
        shares = [router.similar * fraction for fraction in fractions if fraction is not None]
        likeness = torch.cat([torch.cat(part) for part in collected.likeness if part])
        share = sum(shares) / len(shares)
        settings["max_similarity"] = float(likeness.double().quantile(1 - share))
    return type(router)(**settings)


class _ScoreCollector(BaseRouter, BaseRouting):
    """Router that keeps the scores of another one over all calls; also the routing of the latest batch."""

    def __init__(self, router: ScoreRouter, num_blocks: int) -> None:
        self.router, self.observes_attention = router, router.observes_attention
        self.scores: list[list[Tensor]] = [[] for _ in range(num_blocks)]
        self.likeness: list[list[Tensor]] = [[] for _ in range(num_blocks)]

    def start(self, batch: Batch | Data, graph: RadiusGraph, num_blocks: int) -> BaseRouting:
        self.routing = self.router.start(batch, graph, num_blocks)
        return self

    def settings(self) -> dict[str, Any]:
        return self.router.settings()

    def decide(self, state: BlockState) -> Decision:
        level, geometry = self.routing.levels[state.block], self.routing.geometry
        if level is not None:
            scores = self.router.scores(geometry, state, level)
            self.scores[state.block].append(scores)
            if isinstance(self.router, AtomPruner):
                self.likeness[state.block].append(redundancy(geometry, state.x, scores))
        return self.routing.decide(state)

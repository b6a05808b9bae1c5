"""Plans that a search must beat at equal cost: random, by magnitude, and uniformly narrower.

They look at no data and try nothing. Costs are those of the search: a function of the plan and a target.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.block_config import GRID_MLP_WIDTHS, ResolvedBlock
from equiformer2.pruning.structured.block_plan import BlockPlan
from equiformer2.pruning.structured.candidate_cuts import Cut, possible_cuts
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.unit_scores import FORCE_HEAD, Site, UnitScores, weight_scores

Cost = Callable[[PruningPlan], float]
TOLERANCE = 0.01
"""Share of the dense cost by which a plan may end below the target where it can be helped."""

_ALL = ("block", "order", "attn_hidden", "head", "value", "ffn")
# Degrees and orders have no weights that could be compared with those of channels.
_WITH_WEIGHTS = ("block", "attn_hidden", "head", "value", "ffn")


def random_plan(model: EquiformerV2, cost: Cost, target: float, seed: int) -> PruningPlan:
    """Make cuts drawn at random from those the search chooses from; the channels of a cut are random, too.

    Args:
        model: dense network.
        cost: cost of a plan.
        target: cost to come down to, in the unit of `cost`.
        seed: random seed.

    Returns:
        A plan that costs at most `target`.

    Raises:
        InputError: the target cannot be reached.
    """
    rng = np.random.default_rng(seed)
    scores = {unit: rng.random(len(values)) for unit, values in weight_scores(model).items()}

    def choose(cuts: Sequence[tuple[Cut, float]]) -> Cut:
        return cuts[int(rng.integers(len(cuts)))][0]

    return _descend(model, cost, target, scores, _ALL, choose, None)


def magnitude_plan(
    model: EquiformerV2,
    cost: Cost,
    target: float,
    start: PruningPlan | None = None,
) -> PruningPlan:
    """Always make the cut that takes the smallest share of a layer's squared weights per saved cost.

    Args:
        model: dense network.
        cost: cost of a plan.
        target: cost to come down to, in the unit of `cost`.
        start: cuts made already; None for none.

    Returns:
        A plan that costs at most `target`.

    Raises:
        InputError: the target cannot be reached.
    """
    scores = weight_scores(model)
    for unit in {unit for _, unit in scores}:
        sites = [site for site, name in scores if name == unit]
        together = np.sqrt(sum(float(np.square(scores[site, unit]).sum()) for site in sites))
        for site in sites:
            # Branches are compared with each other, channels within their layer (Michel et al., section 3).
            norm = together if unit == "branches" else np.linalg.norm(scores[site, unit])
            scores[site, unit] = scores[site, unit] / max(float(norm), 1e-30)

    return importance_plan(model, cost, target, scores, start)


def importance_plan(
    model: EquiformerV2,
    cost: Cost,
    target: float,
    scores: UnitScores,
    start: PruningPlan | None = None,
    dimensions: Sequence[str] = _WITH_WEIGHTS,
) -> PruningPlan:
    """Always make the cut of the smallest squared score per saved cost, without trying any.

    With Taylor scores it is the pruning of LLM-Pruner (arXiv 2305.11627), by groups of units that depend on
    each other.

    Args:
        model: dense network.
        cost: cost of a plan.
        target: cost to come down to, in the unit of `cost`.
        scores: score of every unit, such as `gradient_scores`.
        start: cuts made already; None for none.
        dimensions: kinds of cuts; those without scores (`order`) count as the best.

    Returns:
        A plan that costs at most `target`.

    Raises:
        InputError: the target cannot be reached.
    """

    def choose(cuts: Sequence[tuple[Cut, float]]) -> Cut:
        return min(cuts, key=lambda item: (item[0].score or 0.0) ** 2 / item[1])[0]

    return _descend(model, cost, target, scores, dimensions, choose, start)


def _descend(
    model: EquiformerV2,
    cost: Cost,
    target: float,
    scores: UnitScores,
    dimensions: Sequence[str],
    choose: Callable[[Sequence[tuple[Cut, float]]], Cut],
    start: PruningPlan | None,
) -> PruningPlan:
    """Make the cut that `choose` picks from those near the target with what each saves, again and again."""
    dense = cost(PruningPlan.keep_all(model.config))
    plan = start or PruningPlan.keep_all(model.config)
    now = cost(plan)
    while now > target:
        saved = [(cut, now - cost(cut.plan)) for cut in possible_cuts(plan, model.config, scores, dimensions)]
        saved = [(cut, less) for cut, less in saved if less > 0]
        if not saved:
            raise InputError(
                f"the target cannot be reached: cuts of {', '.join(dimensions)} end at {now / dense:.1%} of "
                "the dense cost; aim higher or allow more dimensions"
            )
        near = [(cut, less) for cut, less in saved if now - less >= target - TOLERANCE * dense]
        plan = (choose(near) if near else min(saved, key=lambda item: item[1])[0]).plan
        now = cost(plan)
    return plan


def uniform_plan(model: EquiformerV2, cost: Cost, target: float) -> PruningPlan:
    """Cut the same share of heads, attention hidden, value and feed-forward channels from all blocks.

    Units with the least weights go. Heads are few: of the numbers of heads with which the target is met
    closely, the one nearest to the share of the channels is taken.

    Args:
        model: dense network.
        cost: cost of a plan.
        target: cost to come down to, in the unit of `cost`.

    Returns:
        A plan that costs at most `target`.

    Raises:
        InputError: the target cannot be reached.
    """
    widths = _UniformWidths(model)
    dense = cost(PruningPlan.keep_all(model.config))
    most_heads = max(model.config.block(index).num_heads for index in range(model.config.num_layers))
    candidates: list[tuple[bool, float, PruningPlan]] = []
    for heads in range(1, most_heads + 1):
        share = heads / most_heads
        low, high = 0.0, 1.0
        if cost(widths.plan(share, low)) > target:
            continue
        for _ in range(12):
            middle = (low + high) / 2
            if cost(widths.plan(share, middle)) <= target:
                low = middle
            else:
                high = middle
        plan = widths.plan(share, low)
        missed = target - cost(plan)
        far = missed > TOLERANCE * dense
        candidates.append((far, missed if far else abs(share - low), plan))
    if not candidates:
        raise InputError(
            "the target cannot be reached with one head and one channel per layer, which cost "
            f"{cost(widths.plan(0.0, 0.0)):.4g}; aim higher"
        )
    return min(candidates, key=lambda item: item[:2])[2]


class _UniformWidths:
    """Plans of `uniform_plan`: the units of largest weights stay, at least one everywhere."""

    def __init__(self, model: EquiformerV2) -> None:
        self.config, self.scores = model.config, weight_scores(model)

    def plan(self, heads: float, channels: float) -> PruningPlan:
        """The plan that keeps these shares of the heads and of the channels."""
        config = self.config
        blocks = []
        for index in range(config.num_layers):
            block = config.block(index)
            plan = self.attention(index, block, heads, channels) if block.attention else BlockPlan()
            if block.feed_forward:
                changes = {
                    name: self.largest(self.scores[index, name], channels)
                    for name in ("ffn_hidden_channels", *GRID_MLP_WIDTHS)
                    if (index, name) in self.scores
                }
                plan = dataclasses.replace(plan, **changes)  # type: ignore[arg-type]
            blocks.append(plan)
        force_head = BlockPlan()
        if config.regress_forces:
            force_head = self.attention(FORCE_HEAD, config.force_block, heads, channels)
        return PruningPlan(tuple(blocks), force_head=force_head).checked(config)

    def attention(self, site: Site, block: ResolvedBlock, heads: float, channels: float) -> BlockPlan:
        """The attention of a block or of the force head."""
        kept = self.largest(self.scores[site, "heads"], heads)
        table = self.scores[site, "value_channels"].reshape(block.num_heads, block.attn_value_channels)
        return BlockPlan(
            heads=kept,
            attn_hidden_channels=self.largest(self.scores[site, "attn_hidden_channels"], channels),
            value_channels=tuple(self.largest(table[head], channels) for head in kept),
        )

    @staticmethod
    def largest(scores: np.ndarray, share: float) -> tuple[int, ...]:
        """Indices of the largest `share` of `scores`, ascending; of equal ones the earlier."""
        count = max(1, round(share * len(scores)))
        order = np.argsort(-scores, kind="stable")[:count]
        return tuple(sorted(order.tolist()))

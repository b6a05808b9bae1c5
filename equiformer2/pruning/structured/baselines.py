"""Plans that a search must beat at equal cost: random, by magnitude, and uniformly narrower.

They look at no data and try nothing. Costs are those of the search: a function of the plan and a target.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.block_config import GRID_MLP_WIDTHS
from equiformer2.pruning.structured.block_plan import BlockPlan
from equiformer2.pruning.structured.candidate_cuts import Cut, possible_cuts
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.unit_scores import (
    FORCE_HEAD,
    Site,
    UnitScores,
    random_scores,
    weight_scores,
)

Cost = Callable[[PruningPlan], float]
TOLERANCE = 0.01
"""Share of the dense cost by which a plan may end below the target where it can be helped."""

_ALL = ("block", "order", "attn_hidden", "head", "value", "ffn")
# Degrees and orders have no weights that could be compared with those of channels.
_WITH_WEIGHTS = ("block", "attn_hidden", "head", "value", "ffn")


def random_plan(
    model: EquiformerV2, cost: Cost, target: float, seed: int, dimensions: Sequence[str] = _ALL
) -> PruningPlan:
    """Cuts drawn at random from those the search chooses from; which channels go is random as well.

    Args:
        model: the dense network.
        cost: of a plan.
        target: cost to come down to.
        seed: of the draws.
        dimensions: of `cuts.DIMENSIONS`.

    Raises:
        InputError: the target cannot be reached.
    """
    rng = np.random.default_rng(seed)
    scores = random_scores(weight_scores(model), rng)

    def choose(cuts: Sequence[tuple[Cut, float]]) -> Cut:
        return cuts[int(rng.integers(len(cuts)))][0]

    return _descend(model, cost, target, scores, dimensions, choose, None)


def magnitude_plan(
    model: EquiformerV2,
    cost: Cost,
    target: float,
    dimensions: Sequence[str] = _WITH_WEIGHTS,
    start: PruningPlan | None = None,
) -> PruningPlan:
    """Always the cut that takes the smallest share of a layer's squared weights per saved cost.

    Arguments and errors as in `random_plan`; dimensions without weights of their own (`order`) are not cut,
    and `start` is what is cut already.
    """
    scores = weight_scores(model)
    for unit in {unit for _, unit in scores}:
        sites = [site for site, name in scores if name == unit]
        together = np.sqrt(sum(float(np.square(scores[site, unit]).sum()) for site in sites))
        for site in sites:
            # Branches are compared with each other, channels within their layer (Michel et al., section 3).
            norm = together if unit == "branches" else np.linalg.norm(scores[site, unit])
            scores[site, unit] = scores[site, unit] / max(float(norm), 1e-30)

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
    """All blocks lose the same share of heads, attention hidden, value and feed-forward channels.

    Units with the least weights go. Heads are few: of the numbers of heads with which the target is met
    closely, the one nearest to the share of the channels is taken.

    Args:
        model: the dense network.
        cost: of a plan.
        target: cost to come down to.

    Raises:
        InputError: the target cannot be reached.
    """
    scores = weight_scores(model)
    dense = cost(PruningPlan.keep_all(model.config))
    largest = max(model.config.block(index).num_heads for index in range(model.config.num_layers))
    found: list[tuple[bool, float, PruningPlan]] = []
    for heads in range(1, largest + 1):
        share = heads / largest
        low, high = 0.0, 1.0
        if cost(_narrow(model, scores, share, low)) > target:
            continue
        for _ in range(12):
            middle = (low + high) / 2
            if cost(_narrow(model, scores, share, middle)) <= target:
                low = middle
            else:
                high = middle
        plan = _narrow(model, scores, share, low)
        missed = target - cost(plan)
        far = missed > TOLERANCE * dense
        found.append((far, missed if far else abs(share - low), plan))
    if not found:
        raise InputError(
            "the target cannot be reached with one head and one channel per layer, which cost "
            f"{cost(_narrow(model, scores, 0.0, 0.0)):.4g}; aim higher"
        )
    return min(found, key=lambda item: item[:2])[2]


def _narrow(model: EquiformerV2, scores: UnitScores, heads: float, channels: float) -> PruningPlan:
    """At least one unit stays everywhere."""
    config = model.config
    blocks = []
    for index in range(config.num_layers):
        now = config.block(index)
        plan = BlockPlan()
        if now.attention:
            plan = _narrow_attention(scores, index, now.num_heads, now.attn_value_channels, heads, channels)
        if now.feed_forward:
            changes = {
                name: largest(scores[index, name], channels)
                for name in ("ffn_hidden_channels", *GRID_MLP_WIDTHS)
                if (index, name) in scores
            }
            plan = dataclasses.replace(plan, **changes)  # type: ignore[arg-type]
        blocks.append(plan)
    force_head = BlockPlan()
    if config.regress_forces:
        now = config.force_block
        force_head = _narrow_attention(
            scores, FORCE_HEAD, now.num_heads, now.attn_value_channels, heads, channels
        )
    return PruningPlan(tuple(blocks), force_head=force_head).checked(config)


def _narrow_attention(
    scores: UnitScores, site: Site, num_heads: int, values: int, heads: float, channels: float
) -> BlockPlan:
    kept = largest(scores[site, "heads"], heads)
    table = scores[site, "value_channels"].reshape(num_heads, values)
    return BlockPlan(
        heads=kept,
        attn_hidden_channels=largest(scores[site, "attn_hidden_channels"], channels),
        value_channels=tuple(largest(table[head], channels) for head in kept),
    )


def largest(scores: np.ndarray, share: float) -> tuple[int, ...]:
    """Indices of the largest `share` of `scores`, at least one, ascending; of equal ones the earlier."""
    count = max(1, round(share * len(scores)))
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple(sorted(order.tolist()))

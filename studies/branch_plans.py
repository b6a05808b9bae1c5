"""Plans that remove whole branches, brought to the same operations as other plans.

A branch of a small network is a large share of its operations, so removing branches alone ends far below a
target (at 33 % where 50 % was asked for). Here branches go only as long as the plan stays at or above the
target, and `magnitude_plan` cuts the rest from what is left.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from equiformer2.model import EquiformerV2
from equiformer2.pruning.analysis.redundancy import block_statistics
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.structured.baselines import magnitude_plan
from equiformer2.pruning.structured.plan import PruningPlan

BLOCK, COSINE = "block_filled", "cosine_filled"
METHODS = (BLOCK, COSINE)

Cost = Callable[[PruningPlan], float]


def cosine_plan(
    model: EquiformerV2, calibration: Calibration, cost: Cost, target: float
) -> tuple[PruningPlan, dict[str, Any]]:
    """Remove the branches that turn the features least (ShortGPT, arXiv 2403.03853), then fill by magnitude.

    ShortGPT's block influence is one minus the mean cosine of the features in front of and behind a block;
    here of a branch, over all atoms. It is measured once, on the dense network.

    Args:
        model: dense network.
        calibration: structures to measure on.
        cost: share of the dense network's cost that a plan leaves.
        target: share to come down to.

    Returns:
        A plan that costs at most `target`, and the influences of the removed branches in the sequence in
        which they went.

    Raises:
        InputError: magnitude cannot reach the target from there.
    """
    influences: dict[tuple[int, str], float] = {}
    for row in block_statistics(model, calibration.batches):
        if row.tag == "all":
            influences[row.block, "attention"] = 1 - row.cosine_attention
            influences[row.block, "feed_forward"] = 1 - row.cosine_feed_forward
    plan, removed = PruningPlan.keep_all(model.config), []
    for (block, branch), influence in sorted(influences.items(), key=lambda item: item[1]):
        without = plan.with_block(block, **{branch: False})
        if cost(without) >= target:
            plan = without
            removed.append({"block": block, "branch": branch, "influence": influence})
    return _filled(model, cost, target, plan), {"removed": removed}


def block_plan(
    model: EquiformerV2,
    find: Callable[[float], tuple[PruningPlan, dict[str, Any]]],
    cost: Cost,
    target: float,
) -> tuple[PruningPlan, dict[str, Any]]:
    """Remove branches as BlockPruner does (arXiv 2406.10594), then fill by magnitude.

    Args:
        model: dense network.
        find: the search `block`: from a target to its plan and record.
        cost: share of the dense network's cost that a plan leaves.
        target: share to come down to.

    Returns:
        A plan that costs at most `target`, and the record of the search.

    Raises:
        InputError: the search or the filling cannot reach its target.
    """
    plan, record = PruningPlan.keep_all(model.config), dict[str, Any]()
    # The search ends below its target: higher ones are tried until it ends at or above the real one.
    for share in np.linspace(target, 1.0, 20)[1:-1]:
        found, searched = find(round(float(share), 4))
        if cost(found) >= target:
            plan, record = found, searched
            break
    return _filled(model, cost, target, plan), record


def _filled(model: EquiformerV2, cost: Cost, target: float, start: PruningPlan) -> PruningPlan:
    return magnitude_plan(model, cost, target, start=start).checked(model.config)

"""Prune structure: heads, channels, degrees and blocks of a trained network.

A `PruningPlan` names the units that are kept. `make_plan` finds a plan for targets, `masked` tries a plan out
on the full-size network, `shrink` makes the smaller network, and `apply_plan` writes it. `tune_grid` finds
smaller S2 grids.
"""

from equiformer2.pruning.structured.apply import masked, shrink, weight_masks
from equiformer2.pruning.structured.baselines import magnitude_plan, random_plan, uniform_plan
from equiformer2.pruning.structured.block_plan import BlockPlan
from equiformer2.pruning.structured.grid_tuning import GridChoice, GridRow, tune_grid, write_with_grids
from equiformer2.pruning.structured.importance import Importance, gradient_importance, magnitude_importance
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_methods import METHODS, find_plan, search_settings
from equiformer2.pruning.structured.plan_request import PlanRequest, PlanResult, apply_plan, make_plan
from equiformer2.pruning.structured.search import GreedySearch, SearchSettings, Stage

__all__ = [
    "METHODS",
    "BlockPlan",
    "GreedySearch",
    "GridChoice",
    "GridRow",
    "Importance",
    "PlanRequest",
    "PlanResult",
    "PruningPlan",
    "SearchSettings",
    "Stage",
    "apply_plan",
    "find_plan",
    "gradient_importance",
    "magnitude_importance",
    "magnitude_plan",
    "make_plan",
    "masked",
    "random_plan",
    "search_settings",
    "shrink",
    "tune_grid",
    "uniform_plan",
    "weight_masks",
    "write_with_grids",
]

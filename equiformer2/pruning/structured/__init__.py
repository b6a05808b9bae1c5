"""Prune structure: heads, channels, degrees and blocks of a trained network.

A `PruningPlan` says what is kept. `masked` tries it out on the full-size network, `shrink` takes the smaller
network out, and `find_plan` searches for a plan.
"""

from equiformer2.pruning.structured.apply import masked, shrink
from equiformer2.pruning.structured.block_plan import BlockPlan
from equiformer2.pruning.structured.methods import METHODS, find_plan
from equiformer2.pruning.structured.plan import PruningPlan

__all__ = [
    "METHODS",
    "BlockPlan",
    "PruningPlan",
    "find_plan",
    "masked",
    "shrink",
]

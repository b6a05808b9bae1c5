"""Make a trained network smaller.

What is kept is a `PruningPlan`, tried out with `masked`, applied by `shrink`.
"""

from equiformer2.pruning.block_plan import BlockPlan
from equiformer2.pruning.plan import PruningPlan

__all__ = ["BlockPlan", "PruningPlan"]

"""Make a trained network smaller.

What is kept is a `PruningPlan`, tried out with `masked`, applied by `shrink`.
"""

from equiformer2.pruning.block_plan import BlockPlan
from equiformer2.pruning.mask import masked
from equiformer2.pruning.plan import PruningPlan
from equiformer2.pruning.shrink import shrink

__all__ = ["BlockPlan", "PruningPlan", "masked", "shrink"]

"""Make a trained network smaller.

What is kept is a `PruningPlan`, tried out with `masked`, applied by `shrink`; what that saves is counted by
`count_macs` and compared with a target.
"""

from equiformer2.pruning.block_plan import BlockPlan
from equiformer2.pruning.macs import MacCount, count_macs
from equiformer2.pruning.mask import masked
from equiformer2.pruning.plan import PruningPlan
from equiformer2.pruning.shrink import shrink
from equiformer2.pruning.target import LatencyTarget, MacTarget, ParameterTarget, Target, Together

__all__ = [
    "BlockPlan",
    "LatencyTarget",
    "MacCount",
    "MacTarget",
    "ParameterTarget",
    "PruningPlan",
    "Target",
    "Together",
    "count_macs",
    "masked",
    "shrink",
]

"""Make a trained network smaller.

What is kept is a `PruningPlan`, tried out with `masked`, applied by `shrink`; what that saves is counted by
`count_macs` and compared with a target.
"""

from equiformer2.pruning.cost.operations import MacCount, count_macs
from equiformer2.pruning.cost.targets import CombinedTarget, LatencyTarget, MacTarget, ParameterTarget, Target
from equiformer2.pruning.structured.apply import masked, shrink
from equiformer2.pruning.structured.block_plan import BlockPlan
from equiformer2.pruning.structured.plan import PruningPlan

__all__ = [
    "BlockPlan",
    "CombinedTarget",
    "LatencyTarget",
    "MacCount",
    "MacTarget",
    "ParameterTarget",
    "PruningPlan",
    "Target",
    "count_macs",
    "masked",
    "shrink",
]

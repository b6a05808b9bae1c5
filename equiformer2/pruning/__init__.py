"""Make a trained network cheaper.

`structured` removes units, `precision` stores weights in fewer bits, `routing` skips atoms, `recovery` trains
afterwards, `cost` counts or measures, `analysis` reports and compares. Imports run one way: `cost`, then
`structured` and `routing`, then `precision`, then `recovery`, then `analysis`.
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

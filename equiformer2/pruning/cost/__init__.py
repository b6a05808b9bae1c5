"""Count or measure the cost of a network or plan: operations, parameters, time."""

from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.cost.operations import MacCount, count_macs
from equiformer2.pruning.cost.targets import CombinedTarget, LatencyTarget, MacTarget, ParameterTarget, Target
from equiformer2.pruning.cost.time_table import TimeTable

__all__ = [
    "CombinedTarget",
    "LatencyTarget",
    "MacCount",
    "MacTarget",
    "ParameterTarget",
    "Target",
    "TimeTable",
    "compare_latency",
    "count_macs",
]

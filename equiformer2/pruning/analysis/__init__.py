"""Analyze a trained network before pruning, and compare pruned ones with it.

The comparison of methods at equal cost is in `pareto` and `pareto_report`.
"""

from equiformer2.pruning.analysis.lossless import Saving, measure_savings
from equiformer2.pruning.analysis.observe import Observation, observe, time_parts
from equiformer2.pruning.analysis.redundancy import BlockStatistics, block_statistics
from equiformer2.pruning.analysis.redundancy_report import Report, make_report

__all__ = [
    "BlockStatistics",
    "Observation",
    "Report",
    "Saving",
    "block_statistics",
    "make_report",
    "measure_savings",
    "observe",
    "time_parts",
]

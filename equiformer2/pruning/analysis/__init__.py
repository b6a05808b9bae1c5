"""Analyze a trained network before pruning, and compare pruned ones with it.

`make_report` measures use and cost of every part. The comparison of methods at equal cost is in `pareto` and
`pareto_report`, which also train networks and are imported by their own names.
"""

from equiformer2.pruning.analysis.lossless import Saving, measure_savings
from equiformer2.pruning.analysis.observe import Observation, observe, time_parts
from equiformer2.pruning.analysis.redundancy import BlockStatistics, block_statistics
from equiformer2.pruning.analysis.redundancy_report import RedundancyReport, make_report
from equiformer2.pruning.analysis.report_tables import print_report

__all__ = [
    "BlockStatistics",
    "Observation",
    "RedundancyReport",
    "Saving",
    "block_statistics",
    "make_report",
    "measure_savings",
    "observe",
    "print_report",
    "time_parts",
]

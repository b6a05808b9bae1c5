"""Choose a precision for every weight matrix, together with what is pruned (QPruner, arXiv 2412.11629).

A `PrecisionPlan` names the modules that are stored as bfloat16, int8 or int4. `compact_network` makes the
network of a plan, `write_compact` its checkpoint, and `quantize` finds a plan for a limit.
"""

from equiformer2.pruning.precision.compact import compact_network, write_compact
from equiformer2.pruning.precision.plan import PrecisionPlan, matrices, parts_of

__all__ = ["PrecisionPlan", "compact_network", "matrices", "parts_of", "write_compact"]

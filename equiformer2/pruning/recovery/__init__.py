"""Recover accuracy after a cut: distillation, and pruning during training as Lightning callbacks."""

from equiformer2.pruning.recovery.callbacks import DenseTeacher, GradualPruning
from equiformer2.pruning.recovery.distillation import distill
from equiformer2.pruning.recovery.router_callback import TrainRouter

__all__ = [
    "DenseTeacher",
    "GradualPruning",
    "TrainRouter",
    "distill",
]

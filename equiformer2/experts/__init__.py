"""Mixture of linear experts: one network for several data sets, each of which can be taken out of it."""

from equiformer2.experts.gate import ExpertGate
from equiformer2.experts.network import ExpertNetwork, merge_weights
from equiformer2.experts.settings import ExpertSettings

__all__ = ["ExpertGate", "ExpertNetwork", "ExpertSettings", "merge_weights"]

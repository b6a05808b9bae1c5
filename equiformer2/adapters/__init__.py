"""Adapters: which weights get a low-rank map, and which entries of the maps are worth training."""

from equiformer2.adapters.attach import adaptable_weights, attach_adapter
from equiformer2.adapters.scores import prune_adapter
from equiformer2.adapters.settings import AdapterSettings

__all__ = ["AdapterSettings", "adaptable_weights", "attach_adapter", "prune_adapter"]

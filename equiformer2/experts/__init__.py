"""Mixtures of linear experts: scores, pruning and retrieval."""

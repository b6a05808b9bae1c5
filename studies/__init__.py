"""Studies of pruning methods and of EquiformerV3's switches. Run from the clone, never installed."""

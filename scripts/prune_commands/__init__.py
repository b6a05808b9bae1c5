"""The subcommands of `prune.py`, one module each."""

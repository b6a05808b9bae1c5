"""Analyze and compress a trained model: the command `equiformer2 prune`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("prune")

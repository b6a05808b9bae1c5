"""Evaluate a checkpoint: the command `equiformer2 evaluate`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("evaluate")

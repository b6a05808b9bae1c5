"""Inspect a dataset: the command `equiformer2 data inspect`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("data inspect")

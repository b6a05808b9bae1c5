"""Fit reference energies: the command `equiformer2 data references`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("data references")

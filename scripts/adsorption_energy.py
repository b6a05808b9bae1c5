"""Compute an adsorption energy: the command `equiformer2 adsorption energy`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("adsorption energy")

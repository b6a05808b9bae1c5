"""Import own DFT results: the command `equiformer2 data import`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("data import")

"""Report on a training run: the command `equiformer2 report`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("report")

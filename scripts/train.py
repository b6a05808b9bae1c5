"""Train EquiformerV2: the command `equiformer2 train`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("train")

"""Write raw OC20 files to LMDB files: the command `equiformer2 data preprocess`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("data preprocess")

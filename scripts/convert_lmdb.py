"""Convert between LMDB formats: the command `equiformer2 data convert`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("data convert")

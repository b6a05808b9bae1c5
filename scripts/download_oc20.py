"""Download an archive of OC20: the command `equiformer2 data download`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("data download")

"""Import a public checkpoint: the command `equiformer2 checkpoint import`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("checkpoint import")

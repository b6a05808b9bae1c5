"""Relax the systems of IS2RE data: the command `equiformer2 relax-is2re`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("relax-is2re")

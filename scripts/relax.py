"""Relax a structure: the command `equiformer2 relax`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("relax")

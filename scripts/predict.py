"""Predict energies and forces: the command `equiformer2 predict`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("predict")

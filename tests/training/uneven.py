"""Structures of very different sizes, and numbers of free atoms, cut out of genuine OC20 frames."""

from collections.abc import Sequence
from pathlib import Path

import torch

from datasets_oc20 import LmdbWriter, OC20Lmdb

PER_ATOM = ("pos", "atomic_numbers", "tags", "fixed", "forces")


def write_uneven(source: Path, target: Path, sizes: Sequence[int]) -> Path:
    """One structure per size: the first atoms of a frame, of which the first few are free."""
    frames = OC20Lmdb(source, "adsorption")
    with LmdbWriter(target, "adsorption") as writer:
        for number, size in enumerate(sizes):
            data = frames[number % len(frames)]
            for name in PER_ATOM:
                data[name] = data[name][:size].clone()
            data.natoms = size
            data.fixed = torch.arange(size) > (3 * number) % size
            writer.write(data)
    return target

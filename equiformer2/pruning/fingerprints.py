"""Fingerprints of structures, by which stored results are told apart."""

import hashlib
from collections.abc import Sequence

import torch
from torch_geometric.data import Data


def fingerprint_of_structures(structures: Sequence[Data]) -> str:
    """Hash structures: positions, elements, cells, tags, held atoms, and their sequence.

    Args:
        structures: the structures.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for structure in structures:
        digest.update(str(structure.sid).encode())
        for name in ("pos", "atomic_numbers", "cell", "pbc", "fixed", "tags"):
            digest.update(structure[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

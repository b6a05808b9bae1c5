"""Index of the structure that each atom of a batch belongs to."""

import torch
from torch import Tensor


def structure_index(natoms: Tensor, num_atoms: int) -> Tensor:
    """`[N]` int64 index of the structure of each atom, on the device of `natoms`.

    Args:
        natoms: `[B]` atoms of every structure, with the sum `num_atoms`.
        num_atoms: N; known to the host, which would otherwise wait for the device to tell it.
    """
    numbers = torch.arange(len(natoms), device=natoms.device)
    return torch.repeat_interleave(numbers, natoms, output_size=num_atoms)

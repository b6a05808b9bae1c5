"""Index of the structure that each atom belongs to."""

import torch

from equiformer2.graph import structure_index


def test_atoms_are_numbered_by_structure() -> None:
    assert structure_index(torch.tensor([2, 0, 1]), 3).tolist() == [0, 0, 2]
    assert structure_index(torch.tensor([], dtype=torch.int64), 0).tolist() == []

"""The benchmark's input: four OC20-like slabs (70 to 79 atoms, 20 neighbours each)."""

from pathlib import Path

import torch
from torch_geometric.data import Batch, Data

# Which structures each batch holds.
BATCHES = {"B1": (0,), "B4": (0, 1, 2, 3)}


def load_batch(name: str) -> Batch:
    """One of `BATCHES` as the data object that both implementations take, with made-up but fixed targets."""
    stored = torch.load(Path(__file__).with_name("structures.pt"), weights_only=True)
    return Batch.from_data_list([_to_data(stored[index], index) for index in BATCHES[name]])


def _to_data(structure: dict, index: int) -> Data:
    natoms = len(structure["numbers"])
    return Data(
        pos=structure["positions"].float(),
        cell=structure["cell"].float().view(1, 3, 3),
        pbc=structure["pbc"].bool().view(1, 3),
        atomic_numbers=structure["numbers"].long(),
        tags=structure["tags"].long(),
        fixed=structure["fixed"].bool(),
        natoms=natoms,
        energy=torch.tensor([0.3 * (index + 1)]),
        forces=torch.linspace(-1, 1, 3 * natoms).view(natoms, 3),
    )

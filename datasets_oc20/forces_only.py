"""Training data joined with structures of which only the forces are learned."""

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_geometric.data import Data

from datasets_oc20.errors import DataError
from datasets_oc20.reader import OC20Lmdb


class WithForcesOnly(Dataset):
    """The records of `labelled`, then those of `forces_only`, each with a field `has_energy [1]` (bool).

    Forces of another method (a universal potential, say) can be learned beside DFT labels; its energies
    cannot, because they have another zero. So the energies of `forces_only` are there, but marked.

    Raises:
        DataError: one of the two has no forces.
    """

    def __init__(self, labelled: OC20Lmdb, forces_only: OC20Lmdb) -> None:
        self.labelled, self.forces_only = labelled, forces_only
        for dataset in (labelled, forces_only):
            if "forces" not in dataset[0]:
                raise DataError(
                    f"{dataset.describe(0)}: no forces; data.forces_only needs them in both sets."
                )

    def __len__(self) -> int:
        return len(self.labelled) + len(self.forces_only)

    def __getitem__(self, index: int) -> Data:
        extra = index - len(self.labelled)
        data = self.labelled[index] if extra < 0 else self.forces_only[extra]
        data.has_energy = torch.tensor([extra < 0])
        return data

    @property
    def natoms(self) -> np.ndarray:
        """`[len]` atoms per structure."""
        return np.concatenate([self.labelled.natoms, self.forces_only.natoms])

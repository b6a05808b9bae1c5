"""A network that costs nothing, for tests of the training around it."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class StandIn(nn.Module):
    """Trains like the network and takes no time: energies from element counts, forces from positions."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(forces="direct", stress=False)
        self.activation_checkpointing = False
        self.per_element = nn.Embedding(90, 4)
        self.energy = nn.Linear(4, 1)
        self.forces = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.3)

    def check_backend(self) -> None:
        """Any will do."""

    def no_weight_decay(self) -> set[str]:
        return {"energy.bias", "forces.bias"}

    def forward(self, batch: object) -> dict[str, Tensor]:
        atoms = self.energy(self.drop(self.per_element(batch.atomic_numbers))).squeeze(-1)
        energy = torch.zeros(batch.num_graphs).index_add(0, batch.batch, atoms.float()) / 50
        return {"energy": energy, "forces": self.forces(self.drop(batch.pos.float() / 10))}

"""A tiny network and the genuine OC20 file, shared by the training tests."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

LMDB = Path(__file__).parents[1] / "fixtures" / "datasets_oc20" / "s2ef_val_20.lmdb"

TINY_RUN = [
    "--seed=1",
    f"--data.train={LMDB}",
    f"--data.val={LMDB}",
    "--data.energy_kind=adsorption",
    "--data.batch_size=5",
    "--model.num_layers=2",
    "--model.lmax=2",
    "--model.mmax=2",
    "--model.sphere_channels=16",
    "--model.attn_hidden_channels=8",
    "--model.num_heads=2",
    "--model.attn_alpha_channels=8",
    "--model.attn_value_channels=4",
    "--model.ffn_hidden_channels=16",
    "--model.edge_channels=16",
    "--model.grid_resolution=8",
    "--model.num_distance_basis=16",
    "--model.max_radius=3.5",
    "--optim.lr=1e-3",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
]


class StandIn(nn.Module):
    """Trains like the network and takes no time: energies from element counts, forces from positions."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(regress_forces=True)
        self.activation_checkpointing = False
        self.per_element = nn.Embedding(90, 4)
        self.energy = nn.Linear(4, 1)
        self.forces = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.3)

    def no_weight_decay(self) -> set[str]:
        return {"energy.bias", "forces.bias"}

    def forward(self, batch: object) -> dict[str, Tensor]:
        atoms = self.energy(self.drop(self.per_element(batch.atomic_numbers))).squeeze(-1)
        energy = torch.zeros(batch.num_graphs).index_add(0, batch.batch, atoms) / 50
        return {"energy": energy, "forces": self.forces(self.drop(batch.pos / 10))}


@pytest.fixture(scope="session")
def lmdb_path() -> Path:
    return LMDB


@pytest.fixture(scope="session")
def tiny_arguments() -> list[str]:
    return list(TINY_RUN)

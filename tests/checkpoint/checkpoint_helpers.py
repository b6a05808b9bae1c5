"""Small networks, structures and the reference's files for the checkpoint tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoint"
PROVENANCE = {"run": "demo", "steps": 12, "dataset": {"path": "train.lmdb", "frames": 345}}


def small_config(**changes: Any) -> ModelConfig:
    values = {
        "num_layers": 1,
        "sphere_channels": 8,
        "attn_hidden_channels": 8,
        "num_heads": 2,
        "attn_alpha_channels": 4,
        "attn_value_channels": 4,
        "ffn_hidden_channels": 8,
        "edge_channels": 8,
        "lmax": 2,
        "mmax": 1,
        "grid_resolution": 8,
        "max_radius": 6.0,
    }
    return ModelConfig(**(values | changes))


def random_state(model: EquiformerV2, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in model.state_dict().items()}


def some_normalizers() -> Normalizers:
    return Normalizers(Normalizer(-0.75, 2.5), Normalizer(0.0, 1.25))


def structure(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    data = Data(
        pos=4.0 * torch.rand(6, 3, generator=generator),
        atomic_numbers=torch.tensor([29, 29, 29, 8, 6, 1]),
        cell=6.0 * torch.eye(3).view(1, 3, 3),
        pbc=torch.ones(1, 3, dtype=torch.bool),
        natoms=6,
    )
    return Batch.from_data_list([data])


def load_file(name: str) -> dict[str, Any]:
    return torch.load(FIXTURES / name, weights_only=True)

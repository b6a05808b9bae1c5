"""Small networks and structures for the tests of the network."""

from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.model import compiled

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "sphere_channels": 8,
    "attn_hidden_channels": 6,
    "num_heads": 2,
    "attn_alpha_channels": 4,
    "attn_value_channels": 3,
    "ffn_hidden_channels": 10,
    "edge_channels": 7,
    "lmax": 2,
    "mmax": 1,
    "grid_resolution": 8,
    "max_radius": 6.0,
    "alpha_drop": 0.0,
    "drop_path_rate": 0.0,
    "num_distance_basis": 32,
}


#: EquiformerV3's switches, each alone.
V3_SWITCHES: dict[str, dict[str, Any]] = {
    "smooth cutoff": {"smooth_cutoff": True},
    "merged layer norm": {"norm_type": "rms_norm_sh"},
    "SwiGLU-S2": {"use_swiglu_s2_act": True},
    "per-degree radial weights": {"use_m_share_rad": True},
}
ALL_OF_V3 = {key: value for switch in V3_SWITCHES.values() for key, value in switch.items()}


def small_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**(SMALL | changes))


def random_model(
    config: ModelConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> EquiformerV2:
    """A network whose biases, norms and element embeddings are not trivial, in evaluation mode."""
    model = EquiformerV2(config or small_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(0.3 * noise)
            else:
                is_embedding = "embedding.weight" in name
                parameter.copy_(noise if is_embedding else noise / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def as_data(atoms: Atoms, dtype: torch.dtype = torch.float32) -> Data:
    return Data(
        pos=torch.tensor(atoms.get_positions(), dtype=dtype),
        atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.int64),
        cell=torch.tensor(atoms.cell[:], dtype=dtype).view(1, 3, 3),
        pbc=torch.tensor(atoms.pbc).view(1, 3),
        natoms=len(atoms),
    )


def batch_of(*structures: Data) -> Batch:
    return Batch.from_data_list(list(structures))


def slab(dtype: torch.dtype = torch.float32) -> Data:
    """CO on Cu(111), displaced so that no two distances are equal."""
    atoms = fcc111("Cu", (2, 2, 3), vacuum=6.0, periodic=True)
    add_adsorbate(atoms, molecule("CO"), 2.0, "ontop")
    atoms.rattle(0.1, seed=1)
    return as_data(atoms, dtype)


def water(dtype: torch.dtype = torch.float32) -> Data:
    atoms = molecule("H2O")
    atoms.rattle(0.05, seed=2)
    return as_data(atoms, dtype)


def cluster(dtype: torch.dtype = torch.float32) -> Data:
    """Seven atoms at random places: no two distances are equal, no direction is special."""
    points = 1.6 * torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return as_data(Atoms("CuCuPtOCHN", positions=points.numpy()), dtype)


def lone_atom(dtype: torch.dtype = torch.float32) -> Data:
    return as_data(Atoms("O", positions=[[1.0, 2.0, 3.0]]), dtype)


def far_apart(dtype: torch.dtype = torch.float32) -> Data:
    return as_data(Atoms("OH", positions=[[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]]), dtype)


def loss_of(out: dict[str, Tensor]) -> Tensor:
    """A scalar that depends on every output."""
    weights = torch.linspace(-1, 1, out["forces"].numel(), dtype=out["forces"].dtype)
    return out["energy"].square().sum() + (out["forces"].flatten() * weights).sum()


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as for inductor, then run what was traced: no C++ compiler is needed."""
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")

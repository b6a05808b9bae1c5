"""Tiny networks with random weights in native files."""

from pathlib import Path

import torch

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint

TINY = ModelConfig(
    num_layers=1,
    sphere_channels=8,
    attn_hidden_channels=8,
    num_heads=1,
    attn_alpha_channels=4,
    attn_value_channels=4,
    ffn_hidden_channels=8,
    lmax=1,
    mmax=1,
    grid_resolution=6,
    edge_channels=8,
    num_distance_basis=8,
    max_radius=4.0,
    max_neighbors=8,
)


def write_checkpoint(
    path: Path, kind: str, references: torch.Tensor | None = None, **changes: object
) -> Path:
    """A network with random weights, energies of the kind `kind` with a spread of 0.1 eV."""
    config = ModelConfig(**{**vars(TINY), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = EquiformerV2(config)
    save_checkpoint(
        path,
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(Normalizer(-0.7, 0.1), Normalizer(0.0, 2.5), references),
        energy_kind=kind,
        provenance={"origin": "random weights"},
    )
    return path

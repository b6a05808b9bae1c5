"""A network with random weights in a native file, for scripts that take a checkpoint."""

from pathlib import Path

import torch

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint

TINY = {
    "num_layers": 1,
    "sphere_channels": 8,
    "attn_hidden_channels": 8,
    "num_heads": 1,
    "attn_alpha_channels": 4,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 8,
    "lmax": 1,
    "mmax": 1,
    "grid_resolution": 6,
    "edge_channels": 8,
    "num_distance_basis": 8,
    "max_radius": 4.0,
}


def write_tiny_checkpoint(
    path: Path,
    seed: int = 1,
    energy: Normalizer = Normalizer(-0.7, 2.0),  # noqa: B008
    forces: Normalizer = Normalizer(0.0, 2.5),  # noqa: B008
) -> Path:
    """Write a network of adsorption energies with the random weights of `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EquiformerV2(ModelConfig(**TINY))
    save_checkpoint(
        path,
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(energy=energy, forces=forces),
        energy_kind="adsorption",
        provenance={"origin": "random weights"},
    )
    return path

"""Tiny networks with adapters."""

from pathlib import Path
from typing import Any

import torch
from model_helpers import random_model, small_config

from equiformer2 import EquiformerV2
from equiformer2.adapters import AdapterSettings, attach_adapter
from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint
from equiformer2.checkpoint.adapter_files import Adapter, Base
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.model.parametrizations import LowRank, detach

NORMALIZERS = Normalizers(Normalizer(-0.7, 2.0), Normalizer(0.0, 2.5))
NEW_NORMALIZERS = Normalizers(Normalizer(1.5, 3.0), Normalizer(0.0, 1.25))


def network(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> EquiformerV2:
    return random_model(
        small_config(num_layers=1, grid_resolution=6, max_neighbors=6, **changes), dtype, seed
    )


def write_network(path: Path, model: EquiformerV2, energy_kind: str = "adsorption", **origin: Any) -> Path:
    save_checkpoint(
        path,
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=NORMALIZERS,
        energy_kind=energy_kind,
        provenance={"origin": "random weights", **origin},
    )
    return path


def fill(maps: dict[str, LowRank], seed: int = 0) -> None:
    """Random factors in place of those of the start, pruned entries excepted."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in maps.values():
            for factor, kept in ((each.left, each.left_kept), (each.right, each.right_kept)):
                factor.copy_(0.3 * torch.randn(factor.shape, generator=generator) * kept)


def make_adapter(model: EquiformerV2, seed: int = 0, **settings: Any) -> Adapter:
    """A trained adapter of `model`, which is left as it is; one new last layer."""
    chosen = AdapterSettings(**({"rank": 2, "keep": 1.0} | settings))
    base = Base(fingerprint_of_weights(model), "0" * 64, "base.pt", "raw")
    maps = attach_adapter(model, chosen, seed)
    fill(maps, seed)
    detach(model)
    model.requires_grad_(True)
    bias = model.energy_block.so3_linear_2.bias.detach() + 0.5
    return Adapter(
        "adapter.pt", base, chosen.to_dict(), maps, {"energy_block.so3_linear_2.bias": bias},
        NEW_NORMALIZERS, "total", {"origin": "test"},
    )  # fmt: skip

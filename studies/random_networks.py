"""Networks of the public sizes with random weights: their speed and size are those of trained ones."""

import torch

from equiformer2.checkpoint import Checkpoint, Normalizer, Normalizers
from equiformer2.model import EquiformerV2, ModelConfig

SIZES = ("31M", "83M", "153M")


def random_checkpoint(size: str) -> Checkpoint:
    """Make a network with the random weights of seed 0.

    Args:
        size: one of `SIZES`.
    """
    torch.manual_seed(0)
    model = EquiformerV2(ModelConfig.preset(size)).eval()
    one = Normalizer(0.0, 1.0)
    return Checkpoint(
        config=model.config,
        model=model,
        weights="raw",
        available_weights=("raw",),
        normalizers=Normalizers(energy=one, forces=one),
        energy_kind="adsorption",
        provenance={"weights": "random"},
        source_format="equiformer2",
    )

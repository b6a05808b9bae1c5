"""Fingerprints of networks, by which files and stored results that belong to them are told apart."""

import hashlib
from typing import Any

import torch

from equiformer2.model.config import ModelConfig
from equiformer2.model.equiformer import EquiformerV2


def chosen_options(config: ModelConfig) -> dict[str, Any]:
    """Return the options of `config` that differ from the defaults, name -> value."""
    default = ModelConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != default.get(name)}


def fingerprint_of_weights(model: EquiformerV2) -> str:
    """Hash the weights and options of a network.

    The hash changes with any weight and any option, but not with options that a later version adds.

    Args:
        model: the network.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(sorted(chosen_options(model.config).items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]

"""Fingerprints of networks and structures, by which stored results are told apart."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch_geometric.data import Data

from equiformer2.model import EquiformerV2, ModelConfig


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


def fingerprint_of_structures(structures: Sequence[Data]) -> str:
    """Hash structures: positions, elements, cells, tags, held atoms, and their sequence.

    Args:
        structures: the structures.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for structure in structures:
        digest.update(str(structure.sid).encode())
        for name in ("pos", "atomic_numbers", "cell", "pbc", "fixed", "tags"):
            digest.update(structure[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

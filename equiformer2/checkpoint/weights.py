"""A network with given weights, after checking that they are its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equiformer2.checkpoint.constants import shorten
from equiformer2.errors import InputError
from equiformer2.model.config import ModelConfig
from equiformer2.model.equiformer import EquiformerV2


def config_from_values(values: Mapping[str, Any], source: str) -> ModelConfig:
    """`ModelConfig.from_dict` for values that come from a file.

    Raises:
        InputError: naming the file and the key that is unknown, out of range or of the wrong type.
    """
    try:
        return ModelConfig.from_dict(dict(values))
    except (InputError, TypeError) as error:
        raise InputError(f"{source}: the model configuration is not valid: {error}") from error


def build_model(config: ModelConfig, weights: Mapping[str, Tensor], source: str) -> EquiformerV2:
    """`EquiformerV2(config)` holding `weights`, on the CPU, in evaluation mode.

    The random number generator is left as it was: loading must not change what comes after.

    Raises:
        InputError: as `check_weights`.
    """
    with torch.random.fork_rng(devices=[]):
        model = EquiformerV2(config)
    check_weights(model, weights, source)
    model.load_state_dict(weights)
    return model.eval()


def check_weights(model: EquiformerV2, weights: Mapping[str, Tensor], source: str) -> None:
    """Check names, shapes and values of a whole set of weights.

    Raises:
        InputError: listing the names that are missing, unknown, of another shape or not finite.
    """
    expected = model.state_dict()
    shared = [name for name in expected if name in weights]
    findings = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in shared
            if weights[name].shape != expected[name].shape
        ],
        "not floating point": [name for name in shared if not weights[name].is_floating_point()],
        "not finite": [name for name in shared if not bool(torch.isfinite(weights[name]).all())],
    }
    problems = [f"{len(names)} {what}: {shorten(names)}" for what, names in findings.items() if names]
    if problems:
        raise InputError(f"{source}: the weights do not fit the model configuration; {'; '.join(problems)}")

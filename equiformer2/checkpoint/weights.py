"""Construction of a network with given weights, after checks that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equiformer2.checkpoint.compact import CompactState
from equiformer2.checkpoint.constants import shorten
from equiformer2.errors import InputError
from equiformer2.model.config import ModelConfig
from equiformer2.model.equiformer import EquiformerV2
from equiformer2.model.parameters import count_parameters
from equiformer2.values import shown_name

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def config_from_values(values: Mapping[str, Any], source: str) -> ModelConfig:
    """Build a `ModelConfig` from values in a file.

    Args:
        values: by field, as `ModelConfig.from_dict` takes them.
        source: name of the file, for errors.

    Raises:
        InputError: naming the file and the key that is unknown, out of range or of the wrong type.
    """
    try:
        return ModelConfig.from_dict(dict(values))
    except InputError as error:
        raise InputError(f"{source}: the model configuration is not valid: {error}") from error


def build_model(config: ModelConfig, weights: Mapping[str, Tensor], source: str) -> EquiformerV2:
    """Build `EquiformerV2(config)` with `weights`, on the CPU, in evaluation mode.

    The state of the random number generator is restored: loading must not change later random numbers.

    Args:
        config: configuration of the network.
        weights: tensors by name, as in `EquiformerV2.state_dict()`. Those that a `CompactState` stores in
            another form are stored so in the network.
        source: name of the file, for errors.

    Raises:
        InputError: as `check_weights`; at once where the network would be far from the weights in size.
    """
    _check_extent(config, weights, source)
    with torch.random.fork_rng(devices=[]):
        model = EquiformerV2(config)
    values = dict(weights)
    check_weights(model, values, source)
    model.load_state_dict(values)
    if isinstance(weights, CompactState):
        try:
            weights.put_into(model)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
    return model


def _check_extent(config: ModelConfig, weights: Mapping[str, Tensor], source: str) -> None:
    """Compare the sizes on which time and memory of building depend, before anything is built."""

    def length(name: str, dimension: int) -> int | None:
        tensor = weights.get(name)
        return None if tensor is None or tensor.dim() <= dimension else tensor.shape[dimension]

    claimed = count_parameters(config)
    if isinstance(weights, CompactState):
        held = weights.num_numbers
    else:
        held = sum(tensor.numel() for tensor in weights.values())
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.") and name.count(".") > 1}
    # The scalars of the separable norm have a norm of their own.
    degrees = config.lmax + (config.norm_type != "layer_norm_sh")
    sizes = [
        ("num_layers", config.num_layers, len(layers)),
        ("number of degrees in the norm", degrees, length("norm.affine_weight", 0)),
    ]
    for key, of_config, of_weights in sizes:
        # Empty blocks of a pruned network have no weights.
        if key == "num_layers" and config.blocks is not None and (of_weights or 0) <= of_config:
            continue
        if of_weights is not None and of_config != of_weights:
            raise InputError(
                f"{source}: the weights do not fit the model configuration; {key} is {of_config} there, and "
                f"the weights are those of {of_weights}"
            )
    if claimed > 2 * held + 1_000_000:
        raise InputError(
            f"{source}: the weights do not fit the model configuration; it describes a network of "
            f"{claimed:,} parameters, and the weights are {held:,} numbers"
        )


def check_weights(model: EquiformerV2, weights: Mapping[str, Tensor], source: str) -> None:
    """Check names, shapes and values of a whole set of weights.

    Args:
        model: the network.
        weights: tensors by name.
        source: name of the file, for errors.

    Raises:
        InputError: listing the names that are missing, unknown, of another shape or not finite.
    """
    expected = model.state_dict()
    shared = [name for name in expected if name in weights]
    findings = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [shown_name(name) for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in shared
            if weights[name].shape != expected[name].shape
        ],
        "not floating point": [name for name in shared if not weights[name].is_floating_point()],
        "in a precision that is not read (float16, bfloat16, float32 and float64 are)": [
            f"{name} {str(weights[name].dtype).removeprefix('torch.')}"
            for name in shared
            if weights[name].is_floating_point() and weights[name].dtype not in _DTYPES
        ],
        "not finite": [
            name
            for name in shared
            if weights[name].dtype in _DTYPES and not bool(torch.isfinite(weights[name].float()).all())
        ],
    }
    problems = [f"{len(names)} {problem}: {shorten(names)}" for problem, names in findings.items() if names]
    if problems:
        raise InputError(f"{source}: the weights do not fit the model configuration; {'; '.join(problems)}")

"""Attach an adapter to a frozen network."""

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from equiformer2.adapters.settings import AdapterSettings
from equiformer2.errors import InputError
from equiformer2.model.equiformer import EquiformerV2
from equiformer2.model.parametrizations import LowRank, attach
from equiformer2.model.so3_linear import SO3Linear

_LINEAR = (SO3Linear, nn.Linear, nn.Embedding)
_FOR_TRAINING = "dens."


def adaptable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Find the weights that an adapter may change, by name.

    They are those of all linear maps (per degree, of the SO(2) convolutions, radial functions, feed-forward
    networks and heads) and the tables of element embeddings. Norms, biases and attention vectors are not.

    Args:
        model: the network, parametrized or not.
    """
    return {
        f"{path}.weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, _LINEAR) and not path.startswith(_FOR_TRAINING)
    }


def choose_weights(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, Tensor]:
    """Select the adaptable weights whose names match one of the patterns.

    Raises:
        InputError: a pattern matches none.
    """
    known = adaptable_weights(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(
                f"adapter.weights: {pattern!r} matches no weight of the network; there are {len(known)}, "
                f"such as {', '.join(list(known)[:: max(1, len(known) // 4)][:4])}"
            )
    return {
        name: weight
        for name, weight in known.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def attach_adapter(
    model: EquiformerV2, settings: AdapterSettings, seed: int, start: Mapping[str, LowRank] | None = None
) -> dict[str, LowRank]:
    """Hold all weights of a network and put low-rank maps on the chosen ones; its answers stay the same.

    Weights with a single output or input, such as the last layers of the heads, are no larger than their map
    would be: they are trained whole, with their biases.

    Args:
        model: changed in place.
        settings: of the adapter, with a rank above 0.
        seed: of the random factors.
        start: maps to begin with in place of new ones, by the names of their weights; they are copied.

    Returns:
        The maps, by the names of their weights.

    Raises:
        InputError: a pattern of names matches no weight; a map to begin with does not fit its weight.
    """
    if settings.rank < 1:
        raise InputError("adapter.rank is 0: give the rank of the maps")
    chosen = choose_weights(model, settings.weights)
    model.requires_grad_(False)
    if start is not None:
        maps = {name: copy.deepcopy(each) for name, each in start.items()}
        attach(model, maps)
        return maps
    maps = make_maps({name: weight.shape for name, weight in chosen.items()}, settings, seed)
    parameters = dict(model.named_parameters())
    for name in chosen:
        if name not in maps:
            for part in (name, name.removesuffix("weight") + "bias"):
                if part in parameters:
                    parameters[part].requires_grad_(True)
    attach(model, maps)
    return maps


def make_maps(shapes: Mapping[str, torch.Size], settings: AdapterSettings, seed: int) -> dict[str, LowRank]:
    """Make a map for every weight with more than one output and input, from shapes alone.

    Args:
        shapes: of the weights, by name.
        settings: of the adapter.
        seed: of the random factors.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank.at_start(shape, min(settings.total_rank, *shape[-2:]), settings.scale, generator)
        for name, shape in shapes.items()
        if min(shape[-2:]) > 1
    }

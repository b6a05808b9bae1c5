"""A number for every unit that a plan can remove: units with the smallest ones go first."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from equiformer2.model import EquiformerV2
from equiformer2.model.attention import SO2EquivariantGraphAttention
from equiformer2.model.feed_forward import FeedForwardNetwork
from equiformer2.pruning.structured.importance import Importance, magnitude_importance

#: A block's number, the force head or all of the network.
Site = int | str
FORCE_HEAD, NETWORK = "force_head", "network"
#: (site, unit) -> one score per unit. Units are named as the fields of plans are; `branches`
#: are the attention and the feed-forward branch.
UnitScores = dict[tuple[Site, str], np.ndarray]


@torch.no_grad()
def weight_scores(model: EquiformerV2) -> UnitScores:
    """Euclidean norms of the weights that belong to each unit; needs no data."""
    scores = _of_importance(magnitude_importance(model))
    sphere = model.sphere_embedding.weight.square().sum(0)
    for index, block in enumerate(model.blocks):
        attention, network = getattr(block, "ga", None), getattr(block, "ffn", None)
        if isinstance(attention, SO2EquivariantGraphAttention):
            sphere = sphere + attention.proj.weight.square().sum((0, 2))
        if isinstance(network, FeedForwardNetwork):
            sphere = sphere + network.so3_linear_2.weight.square().sum((0, 2))
            scores |= {(index, unit): value for unit, value in _grid_mlp(network).items()}
    if model.force_block is not None:
        scores |= {(FORCE_HEAD, unit): value for unit, value in _attention(model.force_block).items()}
    scores[NETWORK, "sphere_channels"] = _array(sphere.sqrt())
    return scores


def gradient_scores(model: EquiformerV2, importance: Importance) -> UnitScores:
    """`importance` where it says something, and weights elsewhere (force head, inside of the grid MLP)."""
    return weight_scores(model) | _of_importance(importance)


def random_scores(known: Mapping[tuple[Site, str], np.ndarray], rng: np.random.Generator) -> UnitScores:
    """The same units with random numbers."""
    return {key: rng.random(len(values)) for key, values in known.items()}


def _of_importance(importance: Importance) -> UnitScores:
    fields = {
        "heads": importance.heads,
        "value_channels": importance.values,
        "attn_hidden_channels": importance.attn_hidden,
        "ffn_hidden_channels": importance.ffn_hidden,
        "branches": importance.branches,
    }
    return {
        (index, unit): _array(values)
        for unit, blocks in fields.items()
        for index, values in enumerate(blocks)
    }


def _attention(attention: SO2EquivariantGraphAttention) -> dict[str, np.ndarray]:
    hidden = attention.so2_conv_2.in_channels
    values = attention.proj.weight.square().sum((0, 1))
    read = attention.so2_conv_2.fc_m0.weight.square().unflatten(1, (-1, hidden)).sum((0, 1))
    return {
        "heads": _array(values.view(attention.num_heads, -1).sum(1).sqrt()),
        "value_channels": _array(values.sqrt()),
        "attn_hidden_channels": _array(read.sqrt()),
    }


def _grid_mlp(network: FeedForwardNetwork) -> dict[str, np.ndarray]:
    """What enters a channel times what leaves it."""
    if not network.use_grid_mlp:
        return {}
    first, second, third = (network.grid_mlp[index].weight for index in (0, 2, 4))
    entering = network.so3_linear_1.weight.square().sum((0, 2)).sqrt()
    return {
        "ffn_input_channels": _array(entering * first.norm(dim=0)),  # type: ignore[operator]
        "ffn_grid_channels_1": _array(first.norm(dim=1) * second.norm(dim=0)),  # type: ignore[operator]
        "ffn_grid_channels_2": _array(second.norm(dim=1) * third.norm(dim=0)),  # type: ignore[operator]
    }


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()

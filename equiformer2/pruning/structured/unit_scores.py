"""A number for every unit that a plan can remove: units with the smallest ones go first."""

import numpy as np
import torch
from torch import Tensor

from equiformer2.model import EquiformerV2
from equiformer2.model.attention import SO2EquivariantGraphAttention
from equiformer2.model.feed_forward import FeedForwardNetwork
from equiformer2.pruning.structured.importance import Importance, magnitude_importance

#: Number of a block, the force head or the whole network.
Site = int | str
FORCE_HEAD, NETWORK = "force_head", "network"
#: (site, unit) -> one score per unit. Units are named as the fields of plans are; `branches`
#: are the attention and the feed-forward branch.
UnitScores = dict[tuple[Site, str], np.ndarray]

_FIELDS = {
    "heads": "heads",
    "values": "value_channels",
    "attn_hidden": "attn_hidden_channels",
    "ffn_hidden": "ffn_hidden_channels",
    "branches": "branches",
}
"""Fields of `Importance` and the units that they score."""


@torch.no_grad()
def weight_scores(model: EquiformerV2) -> UnitScores:
    """Score every unit by the Euclidean norm of its weights; needs no data.

    A channel inside of the grid MLP has the product of the norms of what enters it and of what leaves it.

    Args:
        model: dense network.

    Returns:
        Scores of the units of all blocks, of the force head and of the sphere channels.
    """
    scores = _scores_of(magnitude_importance(model))
    sphere = model.sphere_embedding.weight.square().sum(0)
    for index, block in enumerate(model.blocks):
        attention, network = getattr(block, "ga", None), getattr(block, "ffn", None)
        if isinstance(attention, SO2EquivariantGraphAttention):
            sphere = sphere + attention.proj.weight.square().sum((0, 2))
        if isinstance(network, FeedForwardNetwork):
            sphere = sphere + network.so3_linear_2.weight.square().sum((0, 2))
            if network.use_grid_mlp:
                first, second, third = (network.grid_mlp[layer].weight for layer in (0, 2, 4))
                entering = network.so3_linear_1.weight.square().sum((0, 2)).sqrt()
                for unit, values in (
                    ("ffn_input_channels", entering * first.norm(dim=0)),  # type: ignore[operator]
                    ("ffn_grid_channels_1", first.norm(dim=1) * second.norm(dim=0)),  # type: ignore[operator]
                    ("ffn_grid_channels_2", second.norm(dim=1) * third.norm(dim=0)),  # type: ignore[operator]
                ):
                    scores[index, unit] = _array(values)
    if model.force_block is not None:
        head = model.force_block
        hidden = head.so2_conv_2.in_channels
        values = head.proj.weight.square().sum((0, 1))
        read = head.so2_conv_2.fc_m0.weight.square().unflatten(1, (-1, hidden)).sum((0, 1))
        scores[FORCE_HEAD, "heads"] = _array(values.view(head.num_heads, -1).sum(1).sqrt())
        scores[FORCE_HEAD, "value_channels"] = _array(values.sqrt())
        scores[FORCE_HEAD, "attn_hidden_channels"] = _array(read.sqrt())
    scores[NETWORK, "sphere_channels"] = _array(sphere.sqrt())
    return scores


def gradient_scores(model: EquiformerV2, importance: Importance) -> UnitScores:
    """Score units by `importance`, and by weights where it has none (force head, inside of the grid MLP).

    Args:
        model: dense network.
        importance: importance of the units of its blocks.

    Returns:
        Scores of the same units as `weight_scores`.
    """
    return weight_scores(model) | _scores_of(importance)


def _scores_of(importance: Importance) -> UnitScores:
    return {
        (index, unit): _array(values)
        for field, unit in _FIELDS.items()
        for index, values in enumerate(getattr(importance, field))
    }


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()

"""Every kind of cut, for small networks of two blocks."""

import dataclasses
from typing import Any

from model_helpers import small_config

from equiformer2 import ModelConfig
from equiformer2.pruning import BlockPlan, PruningPlan

SIZES = {"lmax": 3, "mmax": 2, "num_heads": 3}


def config_of(**changes: Any) -> ModelConfig:
    """Two blocks, degree 3, order 2, three heads."""
    return small_config(**(SIZES | changes))


KEEP = PruningPlan.keep_all(config_of())
SMALL_HEADS = {
    "force_head": BlockPlan(lmax=2, mmax=1, heads=(1, 2), attn_hidden_channels=(1, 2, 4)),
    "energy_head": BlockPlan(ffn_hidden_channels=(1, 4, 5)),
}
PLANS = {
    "heads": KEEP.with_block(0, heads=(0, 2)).with_block(1, heads=(1,)),
    "attention hidden channels": KEEP.with_block(0, attn_hidden_channels=(0, 2, 5)),
    "value channels": KEEP.with_block(0, value_channels=((0, 1), (1, 2), (0, 2))),
    "values of kept heads": KEEP.with_block(1, heads=(0, 2), value_channels=((0,), (2,))),
    "feed-forward": KEEP.with_block(0, ffn_hidden_channels=(0, 3, 9)),
    "no attention": KEEP.with_block(0, attention=False),
    "no feed-forward": KEEP.with_block(1, feed_forward=False),
    "empty block": KEEP.with_block(1, attention=False, feed_forward=False),
    "mmax 1": KEEP.with_block(0, mmax=1),
    "mmax 0": KEEP.with_block(1, mmax=0),
    "lmax 2": KEEP.with_block(0, lmax=2),
    "lmax 1": KEEP.with_block(0, lmax=1).with_block(1, lmax=2, mmax=0),
    "output heads": dataclasses.replace(KEEP, **SMALL_HEADS),
    "sphere": dataclasses.replace(KEEP, sphere_channels=(0, 2, 3, 7)),
}
GRID_PLANS = {
    "input of the grid MLP": KEEP.with_block(0, ffn_input_channels=(0, 3, 9)),
    "inside the grid MLP": KEEP.with_block(1, ffn_grid_channels_1=(1, 2), ffn_grid_channels_2=(5, 6, 8)),
}
#: All at once, in several places.
MANY = dataclasses.replace(
    KEEP.with_block(
        0,
        lmax=2,
        mmax=1,
        heads=(0, 2),
        attn_hidden_channels=(0, 2, 5),
        value_channels=((0, 1), (1, 2)),
        ffn_hidden_channels=(0, 3, 9),
    ).with_block(1, attention=False),
    sphere_channels=(0, 2, 3, 7),
    **SMALL_HEADS,
)

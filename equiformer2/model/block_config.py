"""Widths and degrees of one block of a network whose blocks are not all equal."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from equiformer2.errors import InputError
from equiformer2.values import Optional, Rule, Switch, Whole, mapping, shown


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Widths and degrees of one block (or head); None takes the value of the model.

    Attributes:
        attention: whether there is an attention branch.
        feed_forward: whether there is a feed-forward branch.
        lmax, mmax: highest degree (at least 1) and order of the messages, at most those of the model. The
            features of the atoms keep the model's lmax.
        num_heads, attn_hidden_channels, attn_value_channels: as in `ModelConfig`.
        ffn_hidden_channels: inputs of the feed-forward network's last linear map; outputs of its scalar MLP.
        ffn_input_channels: outputs of its first linear map, where they enter the grid MLP (else they are
            `ffn_hidden_channels`).
        ffn_grid_channels_1, ffn_grid_channels_2: hidden layers of the grid MLP.
    """

    attention: bool = True
    feed_forward: bool = True
    lmax: int | None = None
    mmax: int | None = None
    num_heads: int | None = None
    attn_hidden_channels: int | None = None
    attn_value_channels: int | None = None
    ffn_hidden_channels: int | None = None
    ffn_input_channels: int | None = None
    ffn_grid_channels_1: int | None = None
    ffn_grid_channels_2: int | None = None

    def resolved(self, widths: ResolvedBlock) -> ResolvedBlock:
        """Fill what is None with the model-wide `widths`; the order is cut to the degree."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        block = dataclasses.replace(widths, **{key: value for key, value in own.items() if value is not None})
        return dataclasses.replace(block, mmax=min(block.mmax, block.lmax))

    def check(self, widths: ResolvedBlock, grid_mlp: bool, name: str) -> None:
        """Refuse values that the model cannot have.

        Args:
            widths: the model-wide widths and degrees.
            grid_mlp: feed-forward networks work on the sphere grid.
            name: of this block in the configuration.

        Raises:
            InputError: naming the key below `name`.
        """
        for key in ("lmax", "mmax"):
            value, most = getattr(self, key), getattr(widths, key)
            if value is not None and value > most:
                raise InputError(f"{name}.{key} = {value!r}: must be at most the model's, which is {most}")
        grid = [key for key in GRID_MLP_WIDTHS if getattr(self, key) is not None]
        if grid and not grid_mlp:
            raise InputError(f"{name}.{grid[0]} needs model.use_grid_mlp")

    @classmethod
    def read(cls, value: Any, name: str) -> BlockConfig:
        """Check the fields of a block, given as a `BlockConfig` or as a dictionary of its fields.

        Raises:
            InputError: naming the key below `name` that is unknown (with the nearest one) or out of range.
        """
        values = value if isinstance(value, BlockConfig) else mapping(value, name)
        if isinstance(values, BlockConfig):
            values = {field.name: getattr(values, field.name) for field in dataclasses.fields(cls)}
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key[:100], known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise InputError(f"{name}: unknown key {shown(key)}{hint}")
        return cls(**{key: _RULES[key].read(value, f"{name}.{key}") for key, value in values.items()})


GRID_MLP_WIDTHS = ("ffn_input_channels", "ffn_grid_channels_1", "ffn_grid_channels_2")
WIDTH = Whole(1, 2**14)
"""Channels and heads, of the model and of a block."""
_OWN: dict[str, Rule] = {
    "attention": Switch(),
    "feed_forward": Switch(),
    "mmax": Optional(Whole(0, WIDTH.most)),
}
_RULES = {field.name: _OWN.get(field.name, Optional(WIDTH)) for field in dataclasses.fields(BlockConfig)}


@dataclasses.dataclass(frozen=True)
class ResolvedBlock:
    """Widths and degrees that a block is built from: a `BlockConfig` with nothing left out."""

    attention: bool
    feed_forward: bool
    lmax: int
    mmax: int
    num_heads: int
    attn_hidden_channels: int
    attn_value_channels: int
    ffn_hidden_channels: int
    ffn_input_channels: int
    ffn_grid_channels_1: int
    ffn_grid_channels_2: int

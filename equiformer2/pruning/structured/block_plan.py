"""Units of one block to keep."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from equiformer2.errors import InputError
from equiformer2.model.block_config import GRID_MLP_WIDTHS, BlockConfig, ResolvedBlock
from equiformer2.model.config import ModelConfig
from equiformer2.values import shown

Indices = tuple[int, ...]

_MOST_INDEX = 2**20
# Each list of kept indices and the width of `BlockConfig` that it cuts.
_WIDTHS = {
    "heads": "num_heads",
    "attn_hidden_channels": "attn_hidden_channels",
    "ffn_hidden_channels": "ffn_hidden_channels",
    "ffn_input_channels": "ffn_input_channels",
    "ffn_grid_channels_1": "ffn_grid_channels_1",
    "ffn_grid_channels_2": "ffn_grid_channels_2",
}
_ATTENTION = ("lmax", "mmax", "heads", "attn_hidden_channels", "value_channels")
_FEED_FORWARD = tuple(name for name in _WIDTHS if name.startswith("ffn"))


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Units of one block that are kept; None keeps all. Kept indices ascend.

    Attributes:
        attention: False drops the attention branch.
        feed_forward: False drops the feed-forward branch.
        lmax: highest degree of the messages, at least 1. The features of the atoms keep all degrees.
        mmax: highest order of the messages; never above their degree.
        heads: kept attention heads.
        attn_hidden_channels: kept channels between the two SO(2) convolutions.
        value_channels: for every kept head, in the sequence of `heads`, its kept value channels, as many of
            each.
        ffn_hidden_channels: kept inputs of the feed-forward network's last linear map, with the outputs of
            the scalar MLP and of the grid MLP that they are. Without a grid MLP, its only width.
        ffn_input_channels: kept outputs of the first linear map, where they enter the grid MLP.
        ffn_grid_channels_1: kept channels of the first hidden layer of the grid MLP.
        ffn_grid_channels_2: kept channels of its second hidden layer.

    Raises:
        InputError: a field that has no valid value.
    """

    attention: bool = True
    feed_forward: bool = True
    lmax: int | None = None
    mmax: int | None = None
    heads: Indices | None = None
    attn_hidden_channels: Indices | None = None
    value_channels: tuple[Indices, ...] | None = None
    ffn_hidden_channels: Indices | None = None
    ffn_input_channels: Indices | None = None
    ffn_grid_channels_1: Indices | None = None
    ffn_grid_channels_2: Indices | None = None

    def __post_init__(self) -> None:
        for name in _WIDTHS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_indices(getattr(self, name), f"pruning plan: {name}"))
        if self.value_channels is not None:
            where = "pruning plan: value_channels"
            if isinstance(self.value_channels, str) or not isinstance(self.value_channels, Iterable):
                raise InputError(
                    f"{where} is {shown(self.value_channels)}; it must hold a list for every kept head"
                )
            lists = tuple(check_indices(kept, where) for kept in self.value_channels)
            if len({len(kept) for kept in lists}) != 1:
                raise InputError(f"{where} must keep equally many channels of every kept head")
            object.__setattr__(self, "value_channels", lists)
        for name in ("attention", "feed_forward"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(
                    f"pruning plan: {name} is {shown(getattr(self, name))}; it must be true or false"
                )
        for name, least in (("lmax", 1), ("mmax", 0)):
            value = getattr(self, name)
            if value is not None and (not _is_index(value) or value < least):
                raise InputError(
                    f"pruning plan: {name} is {shown(value)}; it must be a whole number of at least {least}"
                )

    def checked(self, block: ResolvedBlock, config: ModelConfig, name: str) -> BlockPlan:
        """Return the plan in canonical form (None wherever all is kept).

        Args:
            block: the block that the plan applies to.
            config: configuration of its network.
            name: name of the block for errors.

        Returns:
            The canonical plan.

        Raises:
            InputError: the plan does not fit the block; block and field are named.
        """
        where = f"pruning plan: {name}"
        changes: dict[str, Any] = {}
        for branch, fields in (("attention", _ATTENTION), ("feed_forward", _FEED_FORWARD)):
            if not (getattr(self, branch) and getattr(block, branch)):
                given = [field for field in fields if getattr(self, field) is not None]
                if given:
                    raise InputError(f"{where}: {given[0]} is given, but the block has no {branch} branch")
                changes[branch] = True if not getattr(block, branch) else getattr(self, branch)
        for field, width in _WIDTHS.items():
            if field in GRID_MLP_WIDTHS and getattr(self, field) is not None and not config.use_grid_mlp:
                raise InputError(f"{where}: {field} is given, but the network has no grid MLP")
            changes[field] = without_full(getattr(self, field), getattr(block, width), f"{where}: {field}")
        changes["value_channels"] = self._checked_values(block, where)
        lmax = block.lmax if self.lmax is None else self.lmax
        if lmax > block.lmax:
            raise InputError(f"{where}: lmax is {lmax}, but the messages have {block.lmax} already")
        if self.mmax is not None and self.mmax > block.mmax:
            raise InputError(f"{where}: mmax is {self.mmax}, but the messages have {block.mmax} already")
        mmax = min(block.mmax if self.mmax is None else self.mmax, lmax)
        changes["lmax"] = None if lmax == block.lmax else lmax
        changes["mmax"] = None if mmax == min(block.mmax, lmax) else mmax
        return dataclasses.replace(self, **changes)

    def check_is_head(self, where: str, other: str) -> None:
        """Refuse cuts that an output head does not have.

        Args:
            where: name of the head for errors.
            other: branch that the head lacks, `attention` or `feed_forward`.

        Raises:
            InputError: a field of that branch is given, or the head is dropped.
        """
        fields = _ATTENTION if other == "attention" else _FEED_FORWARD
        given = [field for field in fields if getattr(self, field) is not None]
        if given:
            raise InputError(f"{where}: {given[0]} is given, but this head has no {other} network")
        if not (self.attention and self.feed_forward):
            raise InputError(f"{where}: a head cannot be dropped")

    def _checked_values(self, block: ResolvedBlock, where: str) -> tuple[Indices, ...] | None:
        if self.value_channels is None:
            return None
        heads = block.num_heads if self.heads is None else len(self.heads)
        if len(self.value_channels) != heads:
            raise InputError(
                f"{where}: value_channels has lists for {len(self.value_channels)} heads; {heads} are kept"
            )
        width = block.attn_value_channels
        kept = [without_full(each, width, f"{where}: value_channels") for each in self.value_channels]
        return None if kept[0] is None else self.value_channels

    def applied_to(self, own: BlockConfig | None, block: ResolvedBlock) -> BlockConfig | None:
        """Return the configuration of the block after the cuts; the plan is in canonical form.

        Args:
            own: values of the block that differ from the model's; None for none.
            block: the block before the cuts.

        Returns:
            The values afterwards; None if all are the model's.
        """
        changes: dict[str, Any] = {
            width: len(getattr(self, field))
            for field, width in _WIDTHS.items()
            if getattr(self, field) is not None
        }
        if self.value_channels is not None:
            changes["attn_value_channels"] = len(self.value_channels[0])
        if self.lmax is not None:
            changes |= {"lmax": self.lmax, "mmax": min(block.mmax, self.lmax)}
        if self.mmax is not None:
            changes["mmax"] = self.mmax
        changes |= {name: False for name in ("attention", "feed_forward") if not getattr(self, name)}
        return dataclasses.replace(own or BlockConfig(), **changes) if changes else own

    def compose(self, other: BlockPlan, name: str) -> BlockPlan:
        """Return one plan for this one and then `other`, as `PruningPlan.compose`.

        Args:
            other: plan for the block that this plan has cut already.
            name: name of the block for errors.

        Returns:
            The plan for the block that this plan applies to.

        Raises:
            InputError: `other` keeps something that this plan has removed.
        """
        where = f"pruning plan: {name}"
        changes: dict[str, Any] = {}
        for branch, fields in (("attention", _ATTENTION), ("feed_forward", _FEED_FORWARD)):
            if not getattr(self, branch):
                given = [field for field in fields if getattr(other, field) is not None]
                if given:
                    raise InputError(
                        f"{where}: {given[0]} is given, but the {branch} branch was dropped before"
                    )
            elif not getattr(other, branch):
                changes |= {branch: False} | dict.fromkeys(fields)
        if changes.get("attention", self.attention):
            changes |= self._composed(other, _ATTENTION, where)
        if changes.get("feed_forward", self.feed_forward):
            changes |= self._composed(other, _FEED_FORWARD, where)
        return dataclasses.replace(self, **changes)

    def _composed(self, other: BlockPlan, fields: tuple[str, ...], where: str) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for field in fields:
            first, second = getattr(self, field), getattr(other, field)
            if field in _WIDTHS:
                changes[field] = compose_indices(first, second, f"{where}: {field}")
            elif field == "value_channels":
                changes[field] = self._composed_values(other, where)
            elif first is not None and second is not None and second > first:
                raise InputError(f"{where}: {field} is {second}, but it was cut to {first} before")
            else:
                changes[field] = first if second is None else second
        return changes

    def _composed_values(self, other: BlockPlan, where: str) -> tuple[Indices, ...] | None:
        first, second = self.value_channels, other.value_channels
        if first is None:
            return second
        heads = range(len(first)) if other.heads is None else other.heads
        if max(heads) >= len(first) or (second is not None and len(second) != len(heads)):
            raise InputError(f"{where}: value_channels do not fit the heads kept before")
        chosen = [first[head] for head in heads]
        if second is None:
            return tuple(chosen)
        pairs = zip(chosen, second, strict=True)
        return tuple(compose_indices(old, new, f"{where}: value_channels") or old for old, new in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the fields that keep everything."""

        def as_lists(value: Any) -> Any:
            return [as_lists(item) for item in value] if isinstance(value, tuple) else value

        default = BlockPlan()
        return {
            field.name: as_lists(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        }

    @classmethod
    def from_dict(cls, values: Any, source: str) -> BlockPlan:
        """Read the plain values of `to_dict`.

        Args:
            values: mapping as `to_dict` gives it.
            source: name of their origin for errors.

        Returns:
            The plan.

        Raises:
            InputError: an unknown key or an invalid value; `source` and the key are named.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{source} must be a mapping of keys to values, not {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key)[:100], known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise InputError(f"{source}: unknown key {shown(key)}{hint}")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {str(error).removeprefix('pruning plan: ')}") from error


def check_indices(values: Any, where: str) -> Indices:
    """Check a list of kept indices.

    Args:
        values: the list.
        where: name of the field for errors.

    Returns:
        The indices as a tuple.

    Raises:
        InputError: no list, an empty one, or indices that are no whole numbers or do not ascend.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{where} is {shown(values)}; it must be a list of the indices that are kept")
    kept = tuple(values)
    for index in kept:
        if not _is_index(index):
            raise InputError(f"{where} holds {shown(index)}, which is no index")
    if not kept:
        raise InputError(f"{where} keeps nothing: a whole branch is dropped with attention or feed_forward")
    if any(later <= index for index, later in itertools.pairwise(kept)):
        raise InputError(f"{where} must ascend and hold every index once")
    return kept


def without_full(kept: Indices | None, width: int, where: str) -> Indices | None:
    """Replace kept indices by None if they are all of `width`.

    Args:
        kept: kept indices; None for all.
        width: number of units.
        where: name of the field for errors.

    Returns:
        The indices, or None for all.

    Raises:
        InputError: an index is not below `width`.
    """
    if kept is not None and kept[-1] >= width:
        raise InputError(f"{where} keeps {kept[-1]}, but there are only 0 … {width - 1}")
    return None if kept is None or len(kept) == width else kept


def compose_indices(first: Indices | None, second: Indices | None, where: str) -> Indices | None:
    """Return the indices that are kept by `first` and then by `second`.

    Args:
        first: kept indices; None for all.
        second: kept indices, which count in those of `first`; None for all.
        where: name of the field for errors.

    Returns:
        Kept indices, counted as those of `first`.

    Raises:
        InputError: `second` keeps an index that `first` does not have.
    """
    if first is None or second is None:
        return second if first is None else first
    if second[-1] >= len(first):
        raise InputError(f"{where} keeps {second[-1]}, but only {len(first)} were kept before")
    return tuple(first[index] for index in second)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_INDEX

"""The single cuts that searches choose from: one smaller plan per dimension and place."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equiformer2.errors import InputError
from equiformer2.model.block_config import GRID_MLP_WIDTHS, ResolvedBlock
from equiformer2.model.config import ModelConfig
from equiformer2.pruning.structured.block_plan import BlockPlan
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.unit_scores import FORCE_HEAD, NETWORK, Site, UnitScores

#: In the order in which `MultiPruner` goes through them.
DIMENSIONS = ("block", "order", "attn_hidden", "head", "value", "ffn", "sphere")
GRANULARITY = 8
"""A width loses one such part of its channels at a time."""

_NO_ATTENTION = dict.fromkeys(("lmax", "mmax", "heads", "attn_hidden_channels", "value_channels"))
_NO_FEED_FORWARD = dict.fromkeys(("ffn_hidden_channels", *GRID_MLP_WIDTHS))


@dataclass(frozen=True)
class Cut:
    """One step from a plan to a smaller one.

    Attributes:
        dimension: of `DIMENSIONS`.
        site: where.
        what: the branch, `mmax`, `lmax` or the name of the units.
        plan: the whole plan after the cut.
        score: root of the sum of the squared scores of the units that go; None where no score is known.
    """

    dimension: str
    site: Site
    what: str
    plan: PruningPlan
    score: float | None

    @property
    def name(self) -> str:
        """Dimension, site and what is cut, such as `order/2/mmax`."""
        return f"{self.dimension}/{self.site}/{self.what}"


def possible_cuts(
    plan: PruningPlan, config: ModelConfig, scores: UnitScores, dimensions: Sequence[str]
) -> list[Cut]:
    """All cuts of `dimensions` that can follow `plan`, in a fixed order.

    Args:
        plan: what was cut so far.
        config: of the network that `plan` applies to.
        scores: of that network's units; the smallest ones go.
        dimensions: of `DIMENSIONS`.

    Raises:
        InputError: a dimension that does not exist.
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no dimension to prune: use {', '.join(DIMENSIONS)}")
    after = plan.applied_to(config)
    sites: list[tuple[Site, ResolvedBlock, ResolvedBlock]] = [
        (index, config.block(index), after.block(index)) for index in range(config.num_layers)
    ]
    if config.regress_forces:
        sites.append((FORCE_HEAD, config.force_block, after.force_block))
    cuts = []
    for site, base, now in sites:
        for dimension in dimensions:
            cuts += _AT_SITE[dimension](plan, site, base, now, scores) if dimension in _AT_SITE else []
    if "sphere" in dimensions:
        cuts += _sphere(plan, config, scores)
    return cuts


def _own(plan: PruningPlan, site: Site) -> BlockPlan:
    return plan.force_head if site == FORCE_HEAD else plan.blocks[int(site)]


def _changed(plan: PruningPlan, site: Site, **changes: object) -> PruningPlan:
    if site == FORCE_HEAD:
        return dataclasses.replace(plan, force_head=dataclasses.replace(plan.force_head, **changes))  # type: ignore[arg-type]
    return plan.with_block(int(site), **changes)


def _branches(
    plan: PruningPlan, site: Site, base: ResolvedBlock, now: ResolvedBlock, scores: UnitScores
) -> list[Cut]:
    if site == FORCE_HEAD:
        return []
    known, cuts = scores[site, "branches"], []
    if now.attention:
        smaller = _changed(plan, site, attention=False, **_NO_ATTENTION)
        cuts.append(Cut("block", site, "attention", smaller, float(known[0])))
    if now.feed_forward:
        smaller = _changed(plan, site, feed_forward=False, **_NO_FEED_FORWARD)
        cuts.append(Cut("block", site, "feed_forward", smaller, float(known[1])))
    return cuts


def _orders(
    plan: PruningPlan, site: Site, base: ResolvedBlock, now: ResolvedBlock, scores: UnitScores
) -> list[Cut]:
    if not _has_attention(site, now):
        return []
    cuts = []
    if now.mmax > 0:
        cuts.append(Cut("order", site, "mmax", _changed(plan, site, mmax=now.mmax - 1), None))
    if now.lmax > 1:
        lmax = now.lmax - 1
        smaller = _changed(plan, site, lmax=lmax, mmax=min(now.mmax, lmax))
        cuts.append(Cut("order", site, "lmax", smaller, None))
    return cuts


def _attn_hidden(
    plan: PruningPlan, site: Site, base: ResolvedBlock, now: ResolvedBlock, scores: UnitScores
) -> list[Cut]:
    if not _has_attention(site, now):
        return []
    name, width = "attn_hidden_channels", base.attn_hidden_channels
    kept = getattr(_own(plan, site), name) or tuple(range(width))
    fewer, score = without_least(kept, scores[site, name], step_of(width))
    return [Cut("attn_hidden", site, name, _changed(plan, site, **{name: fewer}), score)] if fewer else []


def _heads(
    plan: PruningPlan, site: Site, base: ResolvedBlock, now: ResolvedBlock, scores: UnitScores
) -> list[Cut]:
    if not _has_attention(site, now):
        return []
    own = _own(plan, site)
    kept = own.heads or tuple(range(base.num_heads))
    fewer, score = without_least(kept, scores[site, "heads"], 1)
    if not fewer:
        return []
    changes: dict[str, object] = {"heads": fewer}
    if own.value_channels is not None:
        changes["value_channels"] = tuple(
            values for head, values in zip(kept, own.value_channels, strict=True) if head in fewer
        )
    return [Cut("head", site, "heads", _changed(plan, site, **changes), score)]


def _values(
    plan: PruningPlan, site: Site, base: ResolvedBlock, now: ResolvedBlock, scores: UnitScores
) -> list[Cut]:
    if not _has_attention(site, now):
        return []
    own, width = _own(plan, site), base.attn_value_channels
    heads = own.heads or tuple(range(base.num_heads))
    lists = own.value_channels or (tuple(range(width)),) * len(heads)
    table = scores[site, "value_channels"].reshape(base.num_heads, width)
    pairs = [
        without_least(kept, table[head], step_of(width)) for head, kept in zip(heads, lists, strict=True)
    ]
    if not pairs[0][0]:
        return []
    smaller = _changed(plan, site, value_channels=tuple(fewer for fewer, _ in pairs))
    total = float(np.sqrt(sum(score**2 for _, score in pairs)))
    return [Cut("value", site, "value_channels", smaller, total)]


def _feed_forward(
    plan: PruningPlan, site: Site, base: ResolvedBlock, now: ResolvedBlock, scores: UnitScores
) -> list[Cut]:
    """All widths of the network lose the same part; only the last one has a score that says something."""
    if site == FORCE_HEAD or not now.feed_forward:
        return []
    own, changes, score = _own(plan, site), {}, None
    for name in ("ffn_hidden_channels", *GRID_MLP_WIDTHS):
        if (site, name) not in scores:
            continue
        width = getattr(base, name)
        fewer, lost = without_least(
            getattr(own, name) or tuple(range(width)), scores[site, name], step_of(width)
        )
        if fewer:
            changes[name] = fewer
            score = lost if name == "ffn_hidden_channels" else score
    return [Cut("ffn", site, "widths", _changed(plan, site, **changes), score)] if changes else []


def _sphere(plan: PruningPlan, config: ModelConfig, scores: UnitScores) -> list[Cut]:
    width = config.sphere_channels
    kept = plan.sphere_channels or tuple(range(width))
    fewer, _ = without_least(kept, scores[NETWORK, "sphere_channels"], step_of(width))
    smaller = dataclasses.replace(plan, sphere_channels=fewer)
    return [Cut("sphere", NETWORK, "sphere_channels", smaller, None)] if fewer else []


_AT_SITE = {
    "block": _branches,
    "order": _orders,
    "attn_hidden": _attn_hidden,
    "head": _heads,
    "value": _values,
    "ffn": _feed_forward,
}


def step_of(width: int) -> int:
    """Channels that one cut takes from a width."""
    return max(1, round(width / GRANULARITY))


def without_least(
    kept: tuple[int, ...], scores: np.ndarray, count: int
) -> tuple[tuple[int, ...] | None, float]:
    """`kept` without its `count` units of least score, and the root of their summed squared scores.

    None instead where less than one unit would be left. Equal scores: the later one goes.
    """
    if len(kept) <= count:
        return None, 0.0
    values = scores[list(kept)]
    going = np.lexsort((-np.asarray(kept), values))[:count]
    fewer = tuple(index for position, index in enumerate(kept) if position not in set(going.tolist()))
    return fewer, float(np.sqrt(np.square(values[going]).sum()))


def _has_attention(site: Site, now: ResolvedBlock) -> bool:
    return site == FORCE_HEAD or now.attention

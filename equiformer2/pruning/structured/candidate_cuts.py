"""Single cuts that searches choose from: one smaller plan per dimension and place."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equiformer2.errors import InputError
from equiformer2.model.block_config import GRID_MLP_WIDTHS, ResolvedBlock
from equiformer2.model.config import ModelConfig
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.unit_scores import FORCE_HEAD, NETWORK, Site, UnitScores

#: In the order in which `MultiPruner` goes through them.
DIMENSIONS = ("block", "order", "attn_hidden", "head", "value", "ffn", "sphere")
GRANULARITY = 8
"""Parts of a width: one cut takes one of them."""

_NO_ATTENTION = dict.fromkeys(("lmax", "mmax", "heads", "attn_hidden_channels", "value_channels"))
_NO_FEED_FORWARD = dict.fromkeys(("ffn_hidden_channels", *GRID_MLP_WIDTHS))


@dataclass(frozen=True)
class Cut:
    """One step from a plan to a smaller one.

    Attributes:
        dimension: kind of the cut, of `DIMENSIONS`.
        site: block, force head or whole network that is cut.
        units: branch, `mmax`, `lmax` or field of the plan that is cut.
        plan: whole plan after the cut.
        score: root of the sum of the squared scores of the units that go; None where no score is known.
    """

    dimension: str
    site: Site
    units: str
    plan: PruningPlan
    score: float | None

    @property
    def name(self) -> str:
        """Dimension, site and units, such as `order/2/mmax`."""
        return f"{self.dimension}/{self.site}/{self.units}"

    def joined(self, other: "Cut") -> "Cut":
        """Make one cut of this one and of another that follows the same plan at another place.

        Args:
            other: cut of another block or head; neither may be of the sphere channels.

        Returns:
            The cut of both, at the place that comes first; its units name the other one.
        """
        heads_last = sorted((self, other), key=lambda cut: (cut.site == FORCE_HEAD, cut.site))
        if other.site == FORCE_HEAD:
            plan = dataclasses.replace(self.plan, force_head=other.plan.force_head)
        else:
            index = int(other.site)
            blocks = (*self.plan.blocks[:index], other.plan.blocks[index], *self.plan.blocks[index + 1 :])
            plan = dataclasses.replace(self.plan, blocks=blocks)
        first, second = heads_last
        return Cut(first.dimension, first.site, f"{first.units} + {second.name}", plan, None)


def possible_cuts(
    plan: PruningPlan, config: ModelConfig, scores: UnitScores, dimensions: Sequence[str]
) -> list[Cut]:
    """List all cuts of `dimensions` that can follow `plan`, in a fixed order.

    Args:
        plan: cuts made so far.
        config: configuration of the network that `plan` applies to.
        scores: scores of that network's units; the smallest ones go.
        dimensions: kinds of cuts, of `DIMENSIONS`.

    Returns:
        Cuts site by site, those of the sphere channels last.

    Raises:
        InputError: a dimension that does not exist.
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no dimension to prune: use {', '.join(DIMENSIONS)}")
    after = plan.applied_to(config)
    sites = [
        _SiteCuts(plan, index, config.block(index), after.block(index), scores)
        for index in range(config.num_layers)
    ]
    if config.regress_forces:
        sites.append(_SiteCuts(plan, FORCE_HEAD, config.force_block, after.force_block, scores))
    cuts = [cut for site in sites for dimension in dimensions for cut in site.cuts(dimension)]
    if "sphere" in dimensions:
        width = config.sphere_channels
        kept = plan.sphere_channels or tuple(range(width))
        fewer, _ = without_least(kept, scores[NETWORK, "sphere_channels"], step_of(width))
        if fewer:
            smaller = dataclasses.replace(plan, sphere_channels=fewer)
            cuts.append(Cut("sphere", NETWORK, "sphere_channels", smaller, None))
    return cuts


class _SiteCuts:
    """Cuts of one block or of the force head.

    Args:
        plan: cuts made so far.
        site: number of the block, or `FORCE_HEAD`.
        base: the block in the network that `plan` applies to.
        now: the block as `plan` leaves it.
        scores: scores of the units of that network.
    """

    def __init__(
        self, plan: PruningPlan, site: Site, base: ResolvedBlock, now: ResolvedBlock, scores: UnitScores
    ) -> None:
        self.plan, self.site, self.base, self.now, self.scores = plan, site, base, now, scores
        self.own = plan.force_head if site == FORCE_HEAD else plan.blocks[int(site)]

    def cuts(self, dimension: str) -> list[Cut]:
        """Cuts of one dimension; none for `sphere`, which belongs to the whole network."""
        if dimension == "block":
            return self.branches()
        if dimension == "ffn":
            return self.feed_forward()
        if self.site != FORCE_HEAD and not self.now.attention:
            return []
        attention = {
            "order": self.orders,
            "attn_hidden": self.hidden_channels,
            "head": self.heads,
            "value": self.value_channels,
        }
        return attention[dimension]() if dimension in attention else []

    def cut(self, dimension: str, units: str, score: float | None, **changes: object) -> Cut:
        """The cut that changes these fields of the block's plan."""
        if self.site == FORCE_HEAD:
            head = dataclasses.replace(self.plan.force_head, **changes)  # type: ignore[arg-type]
            plan = dataclasses.replace(self.plan, force_head=head)
        else:
            plan = self.plan.with_block(int(self.site), **changes)
        return Cut(dimension, self.site, units, plan, score)

    def branches(self) -> list[Cut]:
        """Whole branches; the force head keeps its own."""
        if self.site == FORCE_HEAD:
            return []
        known, cuts = self.scores[self.site, "branches"], []
        if self.now.attention:
            changes: dict[str, object] = {"attention": False, **_NO_ATTENTION}
            cuts.append(self.cut("block", "attention", float(known[0]), **changes))
        if self.now.feed_forward:
            changes = {"feed_forward": False, **_NO_FEED_FORWARD}
            cuts.append(self.cut("block", "feed_forward", float(known[1]), **changes))
        return cuts

    def orders(self) -> list[Cut]:
        """The highest order, and the highest degree, of the messages."""
        now, cuts = self.now, []
        if now.mmax > 0:
            cuts.append(self.cut("order", "mmax", None, mmax=now.mmax - 1))
        if now.lmax > 1:
            lmax = now.lmax - 1
            cuts.append(self.cut("order", "lmax", None, lmax=lmax, mmax=min(now.mmax, lmax)))
        return cuts

    def hidden_channels(self) -> list[Cut]:
        """A part of the hidden channels of the attention."""
        name, width = "attn_hidden_channels", self.base.attn_hidden_channels
        kept = self.own.attn_hidden_channels or tuple(range(width))
        fewer, score = without_least(kept, self.scores[self.site, name], step_of(width))
        return [self.cut("attn_hidden", name, score, **{name: fewer})] if fewer else []

    def heads(self) -> list[Cut]:
        """One attention head."""
        kept = self.own.heads or tuple(range(self.base.num_heads))
        fewer, score = without_least(kept, self.scores[self.site, "heads"], 1)
        if not fewer:
            return []
        changes: dict[str, object] = {"heads": fewer}
        if self.own.value_channels is not None:
            changes["value_channels"] = tuple(
                values for head, values in zip(kept, self.own.value_channels, strict=True) if head in fewer
            )
        return [self.cut("head", "heads", score, **changes)]

    def value_channels(self) -> list[Cut]:
        """A part of the value channels of every kept head."""
        width = self.base.attn_value_channels
        heads = self.own.heads or tuple(range(self.base.num_heads))
        lists = self.own.value_channels or (tuple(range(width)),) * len(heads)
        table = self.scores[self.site, "value_channels"].reshape(self.base.num_heads, width)
        pairs = [
            without_least(kept, table[head], step_of(width)) for head, kept in zip(heads, lists, strict=True)
        ]
        if not pairs[0][0]:
            return []
        total = float(np.sqrt(sum(score**2 for _, score in pairs)))
        fewer = tuple(kept for kept, _ in pairs)
        return [self.cut("value", "value_channels", total, value_channels=fewer)]

    def feed_forward(self) -> list[Cut]:
        """The same part of all widths of the feed-forward network; the score is that of the last one."""
        if self.site == FORCE_HEAD or not self.now.feed_forward:
            return []
        changes: dict[str, object] = {}
        score = None
        for name in ("ffn_hidden_channels", *GRID_MLP_WIDTHS):
            if (self.site, name) not in self.scores:
                continue
            width = getattr(self.base, name)
            kept = getattr(self.own, name) or tuple(range(width))
            fewer, lost = without_least(kept, self.scores[self.site, name], step_of(width))
            if fewer:
                changes[name] = fewer
                score = lost if name == "ffn_hidden_channels" else score
        return [self.cut("ffn", "widths", score, **changes)] if changes else []


def step_of(width: int) -> int:
    """Return the number of channels that one cut takes from a width."""
    return max(1, round(width / GRANULARITY))


def without_least(
    kept: tuple[int, ...], scores: np.ndarray, count: int
) -> tuple[tuple[int, ...] | None, float]:
    """Remove the units of least score; of equal ones the later goes.

    Args:
        kept: indices of the units.
        scores: score of every unit by its index.
        count: number of units to remove.

    Returns:
        The remaining indices, and the root of the summed squared scores of the others; None and 0 where
        less than one unit would be left.
    """
    if len(kept) <= count:
        return None, 0.0
    values = scores[list(kept)]
    going = np.lexsort((-np.asarray(kept), values))[:count]
    fewer = tuple(index for position, index in enumerate(kept) if position not in set(going.tolist()))
    return fewer, float(np.sqrt(np.square(values[going]).sum()))

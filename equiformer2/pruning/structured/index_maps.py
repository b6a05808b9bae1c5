"""Entries of each parameter that a plan keeps.

One map for both ways of pruning: masks zero the other entries, `shrink` takes the kept ones out. Layouts are
those of `model.so2_convolution`: outputs of order m = 0 are the attention vector (head-major), gates, then
coefficients (l, channel); of order m > 0 the coefficients (l, channel) of the real part, then those of the
imaginary part. Inputs are (l, channel) with the channels of source and target side by side.

Messages of lower degrees and orders have other constants: the grid's normalization by lmax and the scale
sqrt((2l + 1) / (2 mmax + 1)) of degrees above mmax. The remaining messages must not change by the cut, so the
ratios of old and new constants go into the weights (`Selection.scale`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equiformer2.model.block_config import ResolvedBlock
from equiformer2.model.config import ModelConfig
from equiformer2.model.so3.grid import truncation_scale
from equiformer2.pruning.structured.block_plan import BlockPlan
from equiformer2.pruning.structured.plan import PruningPlan

Kept = Sequence[int] | None


@dataclass(frozen=True)
class Selection:
    """Entries of one parameter that are kept.

    Attributes:
        kept: kept indices along each dimension, None for all.
        scale: factors of the kept entries along one dimension; None for 1.
        scaled_dim: dimension that `scale` runs along.
    """

    kept: tuple[Kept, ...]
    scale: Sequence[float] | None = None
    scaled_dim: int = 0

    def take(self, parameter: Tensor) -> Tensor:
        """Return the smaller parameter; differentiable."""
        for dim, kept in enumerate(self.kept):
            if kept is not None:
                index = torch.tensor(kept, dtype=torch.int64, device=parameter.device)
                parameter = parameter.index_select(dim, index)
        if self.scale is None:
            return parameter
        shape = [1] * parameter.dim()
        shape[self.scaled_dim] = -1
        return parameter * torch.tensor(self.scale, dtype=parameter.dtype, device=parameter.device).view(
            shape
        )

    def mask(self, parameter: Tensor) -> Tensor:
        """Return the kept entries as bool of the parameter's shape."""
        mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        for dim, kept in enumerate(self.kept):
            if kept is not None:
                index = torch.tensor(kept, dtype=torch.int64, device=parameter.device)
                along = torch.zeros(parameter.shape[dim], dtype=torch.bool, device=parameter.device)
                along[index] = True
                mask &= along.view([-1 if d == dim else 1 for d in range(parameter.dim())])
        return mask


class IndexMaps:
    """Selections of all parameters that a plan changes.

    Args:
        config: configuration of the network that the plan applies to.
        plan: units to keep, in canonical form (`PruningPlan.checked`).

    Attributes:
        selections: name of a parameter -> its kept entries; parameters that stay whole are absent.
        removed: beginnings of the names of removed parameters.
    """

    def __init__(self, config: ModelConfig, plan: PruningPlan) -> None:
        self.config = config
        self.sphere: Kept = plan.sphere_channels
        self.selections: dict[str, Selection] = {}
        self.removed: list[str] = []
        self._common()
        for index, cut in enumerate(plan.blocks):
            self._block(f"blocks.{index}", cut, config.block(index))
        if config.regress_forces:
            self._attention("force_block", plan.force_head, config.force_block, None)
        self._feed_forward("energy_block", plan.energy_head, config.energy_block, None)

    def selection(self, name: str) -> Selection | None:
        """Return the kept entries of a parameter; None if it stays whole."""
        return self.selections.get(name)

    def is_removed(self, name: str) -> bool:
        """Return True if the smaller network has no such parameter."""
        return name.startswith(tuple(self.removed))

    def _set(self, name: str, *kept: Kept, scale: Sequence[float] | None = None, scaled_dim: int = 0) -> None:
        if any(each is not None for each in kept) or scale is not None:
            self.selections[name] = Selection(kept, scale, scaled_dim)

    def _norm(self, name: str) -> None:
        for parameter in ("norm_l0.weight", "norm_l0.bias", "affine_bias"):
            self._set(f"{name}.{parameter}", self.sphere)
        self._set(f"{name}.affine_weight", None, self.sphere)

    def _common(self) -> None:
        config = self.config
        self._set("sphere_embedding.weight", None, self.sphere)
        rows = _grid((range(config.lmax + 1), config.lmax + 1), (self.sphere, config.sphere_channels))
        self._radial("edge_degree_embedding.rad_func", rows)
        self._norm("norm")

    def _radial(self, name: str, rows: Kept) -> None:
        self._set(f"{name}.net.6.weight", rows, None)
        self._set(f"{name}.net.6.bias", rows)

    def _block(self, name: str, cut: BlockPlan, old: ResolvedBlock) -> None:
        if old.attention:
            if cut.attention:
                self._norm(f"{name}.norm_1")
                self._attention(f"{name}.ga", cut, old, self.sphere)
            else:
                self.removed += [f"{name}.norm_1.", f"{name}.ga."]
        if old.feed_forward:
            if cut.feed_forward:
                self._norm(f"{name}.norm_2")
                self._feed_forward(f"{name}.ffn", cut, old, self.sphere)
            else:
                self.removed += [f"{name}.norm_2.", f"{name}.ffn."]

    def _feed_forward(self, name: str, cut: BlockPlan, old: ResolvedBlock, outputs: Kept) -> None:
        config, hidden = self.config, cut.ffn_hidden_channels
        first = cut.ffn_input_channels if config.use_grid_mlp else hidden
        self._set(f"{name}.so3_linear_1.weight", None, first, self.sphere)
        self._set(f"{name}.so3_linear_1.bias", first)
        if config.use_grid_mlp:
            self._set(f"{name}.grid_mlp.0.weight", cut.ffn_grid_channels_1, first)
            self._set(f"{name}.grid_mlp.2.weight", cut.ffn_grid_channels_2, cut.ffn_grid_channels_1)
            self._set(f"{name}.grid_mlp.4.weight", hidden, cut.ffn_grid_channels_2)
            self._set(f"{name}.scalar_mlp.0.weight", hidden, self.sphere)
            self._set(f"{name}.scalar_mlp.0.bias", hidden)
        else:
            gates = config.lmax if config.use_gate_act else 1
            rows = _grid((None, gates), (hidden, old.ffn_hidden_channels))
            self._set(f"{name}.gating_linear.weight", rows, self.sphere)
            self._set(f"{name}.gating_linear.bias", rows)
        self._set(f"{name}.so3_linear_2.weight", None, outputs, hidden)
        self._set(f"{name}.so3_linear_2.bias", outputs)

    def _attention(self, name: str, cut: BlockPlan, old: ResolvedBlock, outputs: Kept) -> None:
        channels = _AttentionChannels(self.config, cut, old, self.sphere)
        lmax, mmax = channels.lmax, channels.mmax
        whole = (lmax, mmax) == (old.lmax, old.mmax)
        into_grid, out_of_grid, into_proj = channels.rescaling()
        self._set(f"{name}.alpha_dot", cut.heads, None)
        self._radial_of_convolution(name, channels)
        for m in range(old.mmax + 1):
            first, second = (f"{name}.so2_conv_{number}" for number in (1, 2))
            if m > mmax:
                self.removed += [f"{each}.so2_m_conv.{m - 1}." for each in (first, second)]
                continue
            degrees = range(m, lmax + 1)
            inputs = channels.of_order(m, channels.inputs)
            hidden = channels.of_order(m, channels.hidden)
            values = channels.of_order(m, channels.values)
            columns = None if whole else channels.repeated(degrees, channels.hidden, out_of_grid)
            scale = None if whole else channels.repeated(degrees, channels.hidden, into_grid)
            if m == 0:
                rows, kept_scalars = channels.first_outputs()
                scale = None if scale is None else [1.0] * kept_scalars + scale
                self._set(f"{first}.fc_m0.weight", rows, inputs, scale=scale)
                self._set(f"{first}.fc_m0.bias", rows, scale=scale)
                self._set(f"{second}.fc_m0.weight", values, hidden, scale=columns, scaled_dim=1)
                self._set(f"{second}.fc_m0.bias", values)
                continue
            both = channels.of_both_parts(m)
            scale = None if scale is None else 2 * scale
            self._set(
                f"{first}.so2_m_conv.{m - 1}.fc.weight", both(hidden, channels.hidden), inputs, scale=scale
            )
            self._set(
                f"{second}.so2_m_conv.{m - 1}.fc.weight",
                both(values, channels.values),
                hidden,
                scale=columns,
                scaled_dim=1,
            )
        self._set(
            f"{name}.proj.weight",
            None if lmax == old.lmax else range(lmax + 1),
            outputs,
            channels.values[0],
            scale=None if whole else [into_proj(l) for l in range(lmax + 1)],
        )
        self._set(f"{name}.proj.bias", outputs)

    def _radial_of_convolution(self, name: str, channels: "_AttentionChannels") -> None:
        """Rows of the last linear map: inputs (l, channel) of every order, or once for all orders."""
        old = channels.old
        if self.config.use_m_share_rad:
            self._radial(f"{name}.rad_func", channels.of_order(0, channels.inputs))
            return
        rows, start = [], 0
        for m in range(old.mmax + 1):
            size = (old.lmax + 1 - m) * channels.inputs[1]
            if m <= channels.mmax:
                kept = channels.of_order(m, channels.inputs)
                rows += [start + row for row in (range(size) if kept is None else kept)]
            start += size
        self._radial(f"{name}.so2_conv_1.rad_func", None if len(rows) == start else rows)


class _AttentionChannels:
    """Kept channels of one attention layer: pairs of kept indices and of the number before the cut."""

    def __init__(self, config: ModelConfig, cut: BlockPlan, old: ResolvedBlock, sphere: Kept) -> None:
        self.config, self.cut, self.old = config, cut, old
        self.lmax = old.lmax if cut.lmax is None else cut.lmax
        self.mmax = min(old.mmax if cut.mmax is None else cut.mmax, self.lmax)
        self.inputs = _grid((None, 2), (sphere, config.sphere_channels)), 2 * config.sphere_channels
        self.hidden = cut.attn_hidden_channels, old.attn_hidden_channels
        self.values = self._values(), old.num_heads * old.attn_value_channels

    def _values(self) -> Kept:
        """Kept value channels of all heads, head-major."""
        cut, width = self.cut, self.old.attn_value_channels
        if cut.heads is None and cut.value_channels is None:
            return None
        heads = range(self.old.num_heads) if cut.heads is None else cut.heads
        values = cut.value_channels or [range(width)] * len(heads)
        return [head * width + value for head, kept in zip(heads, values, strict=True) for value in kept]

    def of_order(self, m: int, channels: tuple[Kept, int]) -> Kept:
        """(l, channel) for l = m … lmax."""
        degrees = self.old.lmax + 1 - m
        kept = None if self.lmax == self.old.lmax else range(self.lmax + 1 - m)
        return _grid((kept, degrees), channels)

    def of_both_parts(self, m: int) -> Callable[[Kept, tuple[Kept, int]], Kept]:
        """From the outputs of the real part to those of both parts."""

        def both(kept: Kept, channels: tuple[Kept, int]) -> Kept:
            return _grid((None, 2), (kept, (self.old.lmax + 1 - m) * channels[1]))

        return both

    def first_outputs(self) -> tuple[Kept, int]:
        """Kept outputs of order m = 0 of the first convolution, and the number of scalars among them.

        Scalars are the attention vector and the gates.
        """
        config, old, width = self.config, self.old, self.hidden[1]
        gates, kept_gates = 0, 0
        if config.use_gate_act:
            gates, kept_gates = old.lmax, self.lmax
        elif config.use_sep_s2_act:
            gates, kept_gates = 1, 1
        alpha = config.attn_alpha_channels
        groups = (  # kept rows of each group, and its size before the cut
            (_grid((self.cut.heads, old.num_heads), (None, alpha)), old.num_heads * alpha),
            (_grid((range(kept_gates), gates), self.hidden), gates * width),
            (self.of_order(0, self.hidden), (old.lmax + 1) * width),
        )
        rows: list[int] = []
        start = kept_scalars = 0
        for kept, size in groups:
            kept_scalars = len(rows)
            rows += [start + row for row in (range(size) if kept is None else kept)]
            start += size
        return (None if len(rows) == start else rows), kept_scalars

    @staticmethod
    def repeated(
        degrees: Iterable[int], channels: tuple[Kept, int], factor: Callable[[int], float]
    ) -> list[float]:
        """`factor(l)` for every kept (l, channel)."""
        width = channels[1] if channels[0] is None else len(channels[0])
        return [factor(l) for l in degrees for _ in range(width)]

    def rescaling(
        self,
    ) -> tuple[Callable[[int], float], Callable[[int], float], Callable[[int], float]]:
        """Factors by degree of what goes into the activation, of what comes out of it, and into `proj`."""
        config, old = self.config, self.old
        root = math.sqrt((old.lmax + 1) / (self.lmax + 1))

        def ratio(l: int) -> float:
            return truncation_scale(l, old.mmax) / truncation_scale(l, self.mmax)

        def into_grid(l: int) -> float:
            return 1.0 if config.use_gate_act else ratio(l) / root

        def out_of_grid(l: int) -> float:
            # The scalars of the separable activation do not go through the grid.
            through = not config.use_gate_act and (l > 0 or not config.use_sep_s2_act)
            return ratio(l) * root if through else 1.0

        return into_grid, out_of_grid, ratio


def _grid(outer: tuple[Kept, int], inner: tuple[Kept, int]) -> Kept:
    """Indices of (outer, inner) side by side; each a pair of kept indices (None for all) and their number."""
    (kept_outer, size), (kept_inner, width) = outer, inner
    if (kept_outer is None or len(kept_outer) == size) and (kept_inner is None or len(kept_inner) == width):
        return None
    rows = range(size) if kept_outer is None else kept_outer
    columns = range(width) if kept_inner is None else kept_inner
    return [row * width + column for row in rows for column in columns]


def kept_state(parameters: Mapping[str, Tensor], config: ModelConfig, plan: PruningPlan) -> dict[str, Tensor]:
    """Take the parameters of the smaller network out of those of the full one; differentiable.

    Args:
        parameters: name -> parameter of a network of `config`.
        config: configuration of that network.
        plan: units to keep.

    Returns:
        Name -> parameter of the smaller network.

    Raises:
        InputError: `plan` does not fit `config`.
    """
    maps = IndexMaps(config, plan.checked(config))
    state = {}
    for name, parameter in parameters.items():
        if not maps.is_removed(name):
            selection = maps.selection(name)
            state[name] = parameter if selection is None else selection.take(parameter)
    return state

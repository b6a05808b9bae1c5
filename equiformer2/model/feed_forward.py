"""Feed-forward networks of irreps: EquiformerV2's (paper Figure 1d) and EquiformerV3's."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from equiformer2.kernels import grid_mlp, grid_product
from equiformer2.kernels.aggregate import at_least_float32
from equiformer2.kernels.backend import Backend
from equiformer2.kernels.chunks import no_autocast
from equiformer2.model.activation import (
    GateActivation,
    S2Activation,
    SeparableS2Activation,
    add_to_scalars,
)
from equiformer2.model.block_config import ResolvedBlock
from equiformer2.model.config import ModelConfig
from equiformer2.model.folding import Folding, Layout, read
from equiformer2.model.so3 import S2Grid
from equiformer2.model.so3_linear import SO3Linear, linear_of_degree, linear_per_degree


class MergedMaps(NamedTuple):
    """Linear maps of a feed-forward network on the grid; those in front of it are one, and those behind it.

    Attributes:
        inwards: `[channels of the grid's input, C]` of every degree.
        bias: of `inwards`, for l = 0.
        on_grid: `[channels of the grid's output, channels of its input]`.
        outwards: `[out_channels, channels of the grid's output]` of every degree.
        last_bias: of `outwards`, for l = 0.
    """

    inwards: list[Tensor]
    bias: Tensor
    on_grid: Tensor
    outwards: list[Tensor]
    last_bias: Tensor


class FeedForwardNetwork(Folding):
    """Linear, nonlinearity on the sphere or gate, linear.

    Args:
        config: hyper-parameters.
        block: widths.
        grid: S2 grid of all K coefficients.
        out_channels: channels of the output coefficients.
    """

    def __init__(self, config: ModelConfig, block: ResolvedBlock, grid: S2Grid, out_channels: int) -> None:
        super().__init__()
        lmax, channels, hidden = config.lmax, config.sphere_channels, block.ffn_hidden_channels
        inner = block.ffn_input_channels if config.use_grid_mlp else hidden
        self.so3_linear_1 = SO3Linear(channels, inner, lmax)
        self.scalar_mlp: nn.Sequential | None = None
        self.gating_linear: nn.Linear | None = None
        self.activation: nn.Module | None = None
        self.grid = grid
        self.use_grid_mlp = config.use_grid_mlp
        if config.use_grid_mlp:
            if config.use_sep_s2_act:
                self.scalar_mlp = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU())
            self.grid_mlp = nn.Sequential(
                nn.Linear(inner, block.ffn_grid_channels_1, bias=False),
                nn.SiLU(),
                nn.Linear(block.ffn_grid_channels_1, block.ffn_grid_channels_2, bias=False),
                nn.SiLU(),
                nn.Linear(block.ffn_grid_channels_2, hidden, bias=False),
            )
        elif config.use_gate_act:
            self.gating_linear = nn.Linear(channels, lmax * hidden)
            self.activation = GateActivation([int(k**0.5) for k in range((lmax + 1) ** 2)])
        elif config.use_sep_s2_act:
            self.gating_linear = nn.Linear(channels, hidden)
            self.activation = SeparableS2Activation(grid)
        else:
            self.activation = S2Activation(grid)
        self.so3_linear_2 = SO3Linear(hidden, out_channels, lmax)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """Map `[N, K, C]` to `[N, K, out_channels]`."""
        merged: MergedMaps | None = self.folded()
        if merged is not None:
            return self._merged(x, merged, backend)
        return self.so3_linear_2(self._hidden(x, backend))

    def fold(self, layout: Layout) -> None:
        """Keep the linear maps around the grid merged; without a grid there is nothing to merge."""
        if self.use_grid_mlp:
            super().fold(layout)

    def prepare(self, form: str, layout: Layout) -> MergedMaps:
        """Merge the linear maps in front of the grid, and those behind it."""
        entry, exit_ = self.so3_linear_1, self.so3_linear_2
        first, second, third = (read(layer) for layer in self.grid_mlp if isinstance(layer, nn.Linear))
        return MergedMaps(
            [layout.matrix(weight) for weight in first @ read(entry)],
            first @ read(entry, "bias"),
            second,
            [layout.matrix(weight) for weight in read(exit_) @ third],
            read(exit_, "bias"),
        )

    def _merged(self, x: Tensor, maps: MergedMaps, backend: Backend) -> Tensor:
        """Map `[N, K, C]` to `[N, K, out_channels]` with merged maps."""
        grid = self.grid
        hidden = linear_per_degree(x, maps.inwards, maps.bias)
        hidden = grid_mlp(hidden, grid.to_grid, grid.from_grid, maps.on_grid, backend, grid.factors)
        if self.scalar_mlp is None:
            return linear_per_degree(hidden, maps.outwards, maps.last_bias)
        return torch.cat(
            [
                self.so3_linear_2.degree(self.scalar_mlp(x[:, 0]).unsqueeze(1), 0),
                *(
                    linear_of_degree(hidden[:, l * l : (l + 1) ** 2], weight, None)
                    for l, weight in enumerate(maps.outwards)
                    if l > 0
                ),
            ],
            dim=1,
        )

    def _hidden(self, x: Tensor, backend: Backend) -> Tensor:
        """Compute the features `[N, K, hidden]` before the last linear map."""
        hidden = self.so3_linear_1(x)
        if not self.use_grid_mlp:
            gates = None if self.gating_linear is None else self.gating_linear(x[:, 0])
            assert self.activation is not None
            return self.activation(hidden, gates, backend)
        first, second, third = self.grid_mlp[0], self.grid_mlp[2], self.grid_mlp[4]
        assert isinstance(second, nn.Linear)
        # The first and the last layer act on channels only: K coefficients cost less than G points.
        grid = self.grid
        hidden = grid_mlp(first(hidden), grid.to_grid, grid.from_grid, read(second), backend, grid.factors)
        hidden = third(hidden)
        if self.scalar_mlp is None:
            return hidden
        scalars = self.scalar_mlp(x[:, 0])
        return torch.cat((scalars.unsqueeze(1).to(hidden.dtype), hidden[:, 1:]), dim=1)


class EnergyHead(FeedForwardNetwork):
    """Feed-forward network of which the l = 0 output alone is read.

    What that output does not depend on is there, for the reference's checkpoints, and frozen.

    Args:
        config: hyper-parameters.
        grid: S2 grid of all K coefficients.
    """

    def __init__(self, config: ModelConfig, grid: S2Grid) -> None:
        super().__init__(config, config.energy_block, grid, 1)
        if self.scalar_mlp is not None:
            self.so3_linear_1.requires_grad_(False)
            self.grid_mlp.requires_grad_(False)
        elif isinstance(self.activation, SeparableS2Activation):
            self.so3_linear_1.requires_grad_(False)
        elif isinstance(self.activation, GateActivation):
            assert self.gating_linear is not None
            self.gating_linear.requires_grad_(False)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """`[N, K, C]` normed features to `[N]` energies in float32 or wider; mostly without the grid."""
        if self.scalar_mlp is not None:
            hidden = self.scalar_mlp(x[:, 0])
        elif isinstance(self.activation, GateActivation):
            hidden = nn.functional.silu(self.so3_linear_1.degree(x[:, :1], 0))[:, 0]
        elif isinstance(self.activation, SeparableS2Activation):
            assert self.gating_linear is not None
            hidden = nn.functional.silu(self.gating_linear(x[:, 0]))
        else:
            hidden = self._hidden(x, backend)[:, 0]
        with no_autocast(x):  # what leaves the network is not rounded
            weights = self.so3_linear_2.weights()
            out = self.so3_linear_2.degree(hidden.to(weights.bias.dtype), 0, weights)
        return at_least_float32(out[:, 0])


class SwiGLUFeedForwardNetwork(nn.Module):
    """Linear, SwiGLU-S2 between two linear maps on the sphere grid, linear (EquiformerV3, arXiv 2604.09130).

    Of the coefficients x after the first linear map and the scalars s of the input:

        z = W2 [sigmoid(Wg s) * (W1 x)_1 * (W1 x)_2] on the grid, and z_{l=0} + SwiGLU(Ws s) for the scalars.

    W1, W2 and the gate act on channels only and commute with the transformation between coefficients and
    grid: the product of the two halves of W1 x is all that is computed at the grid points.

    Args:
        config: hyper-parameters.
        block: widths.
        grid: S2 grid of all K coefficients.
        out_channels: channels of the output coefficients.
    """

    def __init__(self, config: ModelConfig, block: ResolvedBlock, grid: S2Grid, out_channels: int) -> None:
        super().__init__()
        channels, hidden = config.sphere_channels, block.ffn_hidden_channels
        self.so3_linear_1 = SO3Linear(channels, hidden, config.lmax)
        self.scalar_linear = nn.Linear(channels, 2 * hidden)
        self.gating_linear = nn.Linear(channels, hidden)
        self.grid_linear_1 = nn.Linear(hidden, 2 * hidden, bias=False)
        self.grid_linear_2 = nn.Linear(hidden, hidden, bias=False)
        self.grid = grid
        self.so3_linear_2 = SO3Linear(hidden, out_channels, config.lmax)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """`[N, K, C]` to `[N, K, out_channels]`."""
        pairs = self.grid_linear_1(self.so3_linear_1(x))
        product = grid_product(pairs, self.grid.to_grid, self.grid.from_grid, backend)
        gate = torch.sigmoid(self.gating_linear(x[:, 0]))
        hidden = self.grid_linear_2(product * gate.unsqueeze(1))
        a, b = self.scalar_linear(x[:, 0]).chunk(2, dim=1)
        return self.so3_linear_2(add_to_scalars(hidden, nn.functional.silu(a) * b))

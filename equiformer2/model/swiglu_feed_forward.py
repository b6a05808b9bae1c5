"""Feed-forward network of EquiformerV3."""

import torch
from torch import Tensor, nn

from equiformer2.kernels import grid_product
from equiformer2.model.activation import add_to_scalars
from equiformer2.model.block_config import ResolvedBlock
from equiformer2.model.config import ModelConfig
from equiformer2.model.so3 import S2Grid
from equiformer2.model.so3_linear import SO3Linear


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

    def forward(self, x: Tensor) -> Tensor:
        """`[N, K, C]` to `[N, K, out_channels]`."""
        pairs = self.grid_linear_1(self.so3_linear_1(x))
        product = grid_product(pairs, self.grid.to_grid, self.grid.from_grid)
        gate = torch.sigmoid(self.gating_linear(x[:, 0]))
        hidden = self.grid_linear_2(product * gate.unsqueeze(1))
        a, b = self.scalar_linear(x[:, 0]).chunk(2, dim=1)
        return self.so3_linear_2(add_to_scalars(hidden, nn.functional.silu(a) * b))

"""Stochastic depth and dropout that keep equivariance."""

import torch
from torch import Tensor, nn


class GraphDropPath(nn.Module):
    """Drop a residual branch for whole structures, scale the rest to keep the mean."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, structure: Tensor, num_structures: int) -> Tensor:
        """`x [N, K, C]`, `structure [N]` index of the structure of each atom."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = torch.rand(num_structures, device=x.device) >= self.drop_prob
        return x * (keep.to(x.dtype) / (1 - self.drop_prob))[structure, None, None]


class EquivariantDropout(nn.Module):
    """Drop whole irreps: one decision per atom and channel for all coefficients."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop channels of features `[N, K, C]`, all coefficients of a channel together."""
        if not self.training or self.drop_prob == 0.0:
            return x
        mask = x.new_ones(x.shape[0], 1, x.shape[2])
        return x * nn.functional.dropout(mask, self.drop_prob)

"""Linear map of irreps."""

import math

import torch
from torch import Tensor, nn


class SO3Linear(nn.Module):
    """One linear map of channels per degree, a bias on l = 0 (paper section 3.1).

    Parameters: `weight [lmax+1, C_out, C_in]`, `bias [C_out]`.
    """

    def __init__(self, in_features: int, out_features: int, lmax: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.lmax = in_features, out_features, lmax
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(lmax + 1, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, K, C_in]` to `[N, K, C_out]`."""
        degrees = [self.degree(x[:, l * l : (l + 1) ** 2], l) for l in range(self.lmax + 1)]
        return torch.cat(degrees, dim=1)

    def degree(self, x: Tensor, l: int) -> Tensor:
        """The map of degree l alone, on `[N, 2l+1, C_in]`."""
        # A slice of the coefficients as one matrix: copying it costs less than a product per atom.
        rows = x.reshape(-1, self.in_features)
        out = nn.functional.linear(rows, self.weight[l], self.bias if l == 0 else None)
        return out.unflatten(0, x.shape[:-1])

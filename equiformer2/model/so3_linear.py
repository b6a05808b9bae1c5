"""Linear map of irreps."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from equiformer2.kernels.chunks import cast_to_autocast
from equiformer2.kernels.linear import linear
from equiformer2.model.folding import Folding, Layout, read


class SO3LinearWeights(NamedTuple):
    """Weights `[C_out, C_in]` of every degree and the bias `[C_out]` of l = 0."""

    degrees: Sequence[Tensor]
    bias: Tensor


class SO3Linear(Folding):
    """One linear map of channels per degree, a bias on l = 0 (paper section 3.1).

    Parameters: `weight [lmax+1, C_out, C_in]`, `bias [C_out]`.
    """

    def __init__(self, in_features: int, out_features: int, lmax: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.lmax = in_features, out_features, lmax
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(lmax + 1, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def weights(self) -> SO3LinearWeights:
        """Read the weights of all degrees."""
        return self.folded() or SO3LinearWeights(read(self), read(self, "bias"))  # type: ignore[arg-type]

    def forward(self, x: Tensor, weights: SO3LinearWeights | None = None) -> Tensor:
        """Map `[N, K, C_in]` to `[N, K, C_out]`, with `weights` that have been read already where given."""
        return linear_per_degree(x, *(weights or self.weights()))

    def degree(self, x: Tensor, l: int, weights: SO3LinearWeights | None = None) -> Tensor:
        """Map the coefficients of degree l alone, `[N, 2l+1, C_in]`; `weights` as in `forward`."""
        degrees, bias = weights or self.weights()
        return linear_of_degree(x, degrees[l], bias if l == 0 else None)

    def prepare(self, form: str, layout: Layout) -> SO3LinearWeights:
        """Round and pack the weights of every degree."""
        return SO3LinearWeights([layout.matrix(weight) for weight in read(self)], read(self, "bias"))


def linear_per_degree(x: Tensor, weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Map `[N, K, C_in]` to `[N, K, C_out]` by `weights [C_out, C_in]` per degree; the bias is for l = 0."""
    (x,) = cast_to_autocast(x)
    parts = (x[:, l * l : (l + 1) ** 2] for l in range(len(weights)))
    biases = [bias, *[None] * len(weights)]
    return torch.cat(
        [linear_of_degree(part, weight, b) for part, weight, b in zip(parts, weights, biases, strict=False)],
        dim=1,
    )


def linear_of_degree(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map `[N, 2l+1, C_in]` to `[N, 2l+1, C_out]`."""
    x, weight = cast_to_autocast(x, weight)
    # A slice of the coefficients as one matrix: copying it costs less than a product per atom.
    out = linear(x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.unflatten(0, x.shape[:-1])

"""Linear map of irreps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from equiformer2.kernels.chunks import cast_to_autocast
from equiformer2.kernels.linear import linear, pack
from equiformer2.model.folding import Folding, usable


class SO3Linear(Folding):
    """One linear map of channels per degree, a bias on l = 0 (paper section 3.1).

    Parameters: `weight [lmax+1, C_out, C_in]`, `bias [C_out]`.
    """

    _folded: list[Tensor] | None

    def __init__(self, in_features: int, out_features: int, lmax: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.lmax = in_features, out_features, lmax
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(lmax + 1, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, K, C_in]` to `[N, K, C_out]`."""
        return linear_per_degree(x, self._weights(), self.bias)

    def degree(self, x: Tensor, l: int) -> Tensor:
        """The map of degree l alone, on `[N, 2l+1, C_in]`."""
        return linear_of_degree(x, self._weights()[l], self.bias if l == 0 else None)

    def fold(self, dtype: torch.dtype | None, packed: bool) -> None:
        """Round the weights once."""
        self._folded = rounded(self.weight.detach(), dtype or self.weight.dtype, packed)

    def unfold(self) -> None:
        """Forget them."""
        self._folded = None

    def _weights(self) -> Sequence[Tensor]:
        return self._folded if usable(self._folded, self.weight) else self.weight  # type: ignore[return-value]


def linear_per_degree(x: Tensor, weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """`[N, K, C_in]` to `[N, K, C_out]` by `weights [C_out, C_in]` of every degree; the bias is for l = 0."""
    (x,) = cast_to_autocast(x)
    parts = (x[:, l * l : (l + 1) ** 2] for l in range(len(weights)))
    biases = [bias, *[None] * len(weights)]
    return torch.cat(
        [linear_of_degree(part, weight, b) for part, weight, b in zip(parts, weights, biases, strict=False)],
        dim=1,
    )


def linear_of_degree(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[N, 2l+1, C_in]` to `[N, 2l+1, C_out]`."""
    x, weight = cast_to_autocast(x, weight)
    # A slice of the coefficients as one matrix: copying it costs less than a product per atom.
    out = linear(x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.unflatten(0, x.shape[:-1])


def rounded(weights: Tensor, dtype: torch.dtype, packed: bool) -> list[Tensor]:
    """`weights [lmax+1, C_out, C_in]` per degree, as `linear_per_degree` takes them."""
    return [pack(weight) if packed else weight for weight in weights.to(dtype)]

"""Distance basis and radial functions."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from equiformer2.kernels.rows import gather_rows
from equiformer2.model.folding import Folding, Layout, read
from equiformer2.model.so3 import DerivedConstants


class GaussianBasis(DerivedConstants):
    """Gaussians of the distance, equally spaced up to the cutoff, two spacings wide (paper Table 7)."""

    offset: Tensor

    def __init__(self, max_radius: float, num_basis: int) -> None:
        super().__init__()
        self.add_constant("offset", torch.linspace(0.0, max_radius, num_basis, dtype=torch.float64))
        self.coeff = -0.5 / (2.0 * max_radius / (num_basis - 1)) ** 2

    def forward(self, distances: Tensor) -> Tensor:
        """Expand distances `[E]` Å to `[E, num_basis]`."""
        return torch.exp(self.coeff * (distances.unsqueeze(1) - self.offset) ** 2)


def smooth_envelope(distances: Tensor, max_radius: float) -> Tensor:
    """1 - 21 x^5 + 35 x^6 - 15 x^7 of x = distance / cutoff, and 0 beyond (EquiformerV3's smooth cutoff).

    The envelope of DimeNet (Gasteiger et al., 2020) with p = 5, without its division by x. It and its first
    two derivatives vanish at the cutoff. Written as a product, which does not round to negative values there.

    Args:
        distances: `[E]` Å.
        max_radius: Å.

    Returns:
        `[E]`.
    """
    x = distances / max_radius
    left = (1 - x).clamp(min=0)
    return left**3 * (1 + x * (3 + x * (6 + x * (10 + x * 15))))


class HiddenLayer(NamedTuple):
    """Weights of a linear map `[D, inputs]` and its bias, then of a layer norm, `[D]` each."""

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor

    def activated(self, x: Tensor) -> Tensor:
        """Normalise and activate what the linear map gives."""
        normed = nn.functional.layer_norm(x, self.scale.shape, self.scale, self.shift)
        return nn.functional.silu(normed)


class RadialWeights(NamedTuple):
    """Weights of a radial function: two hidden layers, `output [outputs, D]` and its bias.

    The last linear map is left to the caller: the fused convolution applies it where its result is used.
    """

    first: HiddenLayer
    second: HiddenLayer
    output: Tensor
    bias: Tensor

    def hidden(self, basis: Tensor, elements: "ElementPairs | None") -> Tensor:
        """Compute `[E, D]` from the distance basis `[E, B]` and the embeddings of both elements."""
        weight, width = self.first.weight, basis.shape[1]
        x = nn.functional.linear(basis, weight[:, :width], self.first.bias)
        if elements is not None:
            # A linear layer of a concatenation is a sum, and there are few elements but many edges:
            # the embeddings are multiplied per element and looked up per edge.
            by_source, by_target = weight[:, width:].chunk(2, dim=1)
            x = x + elements.look_up_source(nn.functional.linear(elements.source_table, by_source))
            x = x + elements.look_up_target(nn.functional.linear(elements.target_table, by_target))
        x = self.first.activated(x)
        return self.second.activated(nn.functional.linear(x, self.second.weight, self.second.bias))


class RadialFunction(Folding):
    """Two hidden layers of linear, layer norm and SiLU, then a linear layer (paper Figure 1b).

    The input is the distance basis, followed by the embeddings of both elements when there are any.
    """

    def __init__(self, num_inputs: int, hidden: int, num_outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(num_inputs, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, num_outputs),
        )

    def weights(self) -> RadialWeights:
        """Read the weights; after `fold`, `output` is for `kernels.linear` alone."""
        return self.folded() or self.plain_weights()  # type: ignore[no-any-return]

    def plain_weights(self) -> RadialWeights:
        """Read the weights as they are."""
        first, second = (
            HiddenLayer(*(read(self.net[n], name) for n in (i, i + 1) for name in ("weight", "bias")))
            for i in (0, 3)
        )
        return RadialWeights(first, second, read(self.net[6]), read(self.net[6], "bias"))

    def prepare(self, form: str, layout: Layout) -> RadialWeights:
        """Round and pack the weights of the last linear map."""
        weights = self.plain_weights()
        return weights._replace(output=layout.matrix(weights.output))


class ElementPairs:
    """Embeddings of the elements at both ends of every edge, kept as tables and indices."""

    def __init__(self, source_table: Tensor, target_table: Tensor, source: Tensor, target: Tensor) -> None:
        self.source_table, self.target_table = source_table, target_table  # [Z, D]
        self.source, self.target = source, target  # [E] atomic numbers

    def look_up_source(self, table: Tensor) -> Tensor:
        """Take the rows of `table [Z, D]` for the source atoms, `[E, D]`."""
        return self._look_up(table, self.source)

    def look_up_target(self, table: Tensor) -> Tensor:
        """Take the rows of `table [Z, D]` for the target atoms, `[E, D]`."""
        return self._look_up(table, self.target)

    @staticmethod
    def _look_up(table: Tensor, index: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return gather_rows(table, index)
        # F.embedding has a faster backward pass than indexing when there are few rows.
        return nn.functional.embedding(index, table)

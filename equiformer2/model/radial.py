"""Distance basis and radial functions."""

import torch
from torch import Tensor, nn

from equiformer2.kernels.linear import pack
from equiformer2.kernels.rows import gather_rows
from equiformer2.model.folding import Folding, usable
from equiformer2.model.so3 import DerivedConstants


class GaussianBasis(DerivedConstants):
    """Gaussians of the distance, equally spaced up to the cutoff, two spacings wide (paper Table 7)."""

    offset: Tensor

    def __init__(self, max_radius: float, num_basis: int) -> None:
        super().__init__()
        self.add_constant("offset", torch.linspace(0.0, max_radius, num_basis, dtype=torch.float64))
        self.coeff = -0.5 / (2.0 * max_radius / (num_basis - 1)) ** 2

    def forward(self, distances: Tensor) -> Tensor:
        """`[E]` Å to `[E, num_basis]`."""
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


class RadialFunction(Folding):
    """Two hidden layers of linear, layer norm and SiLU, then a linear layer (paper Figure 1b).

    The input is the distance basis, followed by the embeddings of both elements when there are any. The last
    layer is left to the caller (`output`), because the fused convolution applies it where its result is used.
    """

    _folded: Tensor | None

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

    @property
    def output(self) -> nn.Linear:
        layer = self.net[6]
        assert isinstance(layer, nn.Linear)
        return layer

    def output_weight(self) -> Tensor:
        """`[outputs, D]` of `output`, or what `fold` has made of it, where GEMMs run in its precision."""
        weight, folded = self.output.weight, self._folded
        return weight if folded is None or not usable([folded], weight) else folded

    def fold(self, dtype: torch.dtype | None, packed: bool) -> None:
        """Round the last layer's weights once."""
        weight = self.output.weight.detach()
        weight = weight.to(dtype or weight.dtype)
        self._folded = pack(weight) if packed else weight

    def unfold(self) -> None:
        """Forget them."""
        self._folded = None

    def hidden(self, basis: Tensor, elements: "ElementPairs | None") -> Tensor:
        """Last hidden layer `[E, D]` from the distance basis `[E, B]` and the embeddings of both elements."""
        first = self.net[0]
        assert isinstance(first, nn.Linear)
        width = basis.shape[1]
        x = nn.functional.linear(basis, first.weight[:, :width], first.bias)
        if elements is not None:
            # A linear layer of a concatenation is a sum, and there are few elements but many edges:
            # the embeddings are multiplied per element and looked up per edge.
            by_source, by_target = first.weight[:, width:].chunk(2, dim=1)
            x = x + elements.look_up_source(nn.functional.linear(elements.source_table, by_source))
            x = x + elements.look_up_target(nn.functional.linear(elements.target_table, by_target))
        for layer in list(self.net)[1:6]:
            x = layer(x)
        return x


class ElementPairs:
    """Embeddings of the elements at both ends of every edge, kept as tables and indices."""

    def __init__(self, source_table: Tensor, target_table: Tensor, source: Tensor, target: Tensor) -> None:
        self.source_table, self.target_table = source_table, target_table  # [Z, D]
        self.source, self.target = source, target  # [E] atomic numbers

    def look_up_source(self, table: Tensor) -> Tensor:
        """Rows of `table [Z, D]` for the source atoms, `[E, D]`."""
        return _look_up(table, self.source)

    def look_up_target(self, table: Tensor) -> Tensor:
        """Rows of `table [Z, D]` for the target atoms, `[E, D]`."""
        return _look_up(table, self.target)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return gather_rows(table, index)
    # F.embedding has a faster backward pass than indexing when there are few rows.
    return nn.functional.embedding(index, table)

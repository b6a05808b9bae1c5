"""Nonlinearities of irreps."""

import torch
from torch import Tensor, nn

from equiformer2.kernels import grid_activation, grid_product, separable_grid_activation
from equiformer2.kernels.backend import Backend
from equiformer2.model.so3 import S2Grid


class SmoothLeakyReLU(nn.Module):
    """Leaky ReLU, smooth: (1+a)/2 x + (1-a)/2 x (2 sigmoid(x) - 1), a = 0.2 (Equiformer, Appendix).

    Written as a x + (1-a) SiLU(x), which is the same with half of the passes over memory.
    """

    negative_slope = 0.2

    def forward(self, x: Tensor) -> Tensor:
        """Apply the nonlinearity to `x` of any shape."""
        a = self.negative_slope
        return torch.add(a * x, nn.functional.silu(x), alpha=1 - a)


class EdgeActivation(nn.Module):
    """Nonlinearity of hidden features whose gates are further scalars.

    Attributes:
        num_gate_rows: how many scalars it takes per output channel.
        inputs_per_channel: how many channels of coefficients it takes per output channel.
    """

    num_gate_rows: int
    inputs_per_channel = 1

    def of_columns(self, hidden: Tensor, channels: int, backend: Backend, rows: int | None = None) -> Tensor:
        """`hidden [B, (gates + R inputs) C]`, gates first, to `[B, R, C]` or to the first `rows` of them."""
        gates = self.num_gate_rows * channels
        coefficients = hidden[:, gates:].unflatten(1, (-1, self.inputs_per_channel * channels))
        out: Tensor = self(coefficients, hidden[:, :gates], backend, rows)
        return out


class S2Activation(EdgeActivation):
    """SiLU of the function on the sphere that the coefficients describe (paper section 4.3)."""

    num_gate_rows = 0

    def __init__(self, grid: S2Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor, gates: Tensor | None, backend: Backend, rows: int | None = None) -> Tensor:
        """`[B, R, C]` to `[B, R, C]`, or to the first `rows` coefficients alone."""
        return grid_activation(x, self.grid.to_grid, self.grid.from_grid[:rows], backend)


class SeparableS2Activation(EdgeActivation):
    """S2 activation for l > 0; the scalars are SiLU of separate inputs (paper section 4.3, Figure 2b)."""

    num_gate_rows = 1

    def __init__(self, grid: S2Grid) -> None:
        super().__init__()
        self.s2_act = S2Activation(grid)

    def forward(self, x: Tensor, gates: Tensor, backend: Backend, rows: int | None = None) -> Tensor:
        """`x [B, R, C]`, `gates [B, C]`; row 0 is the scalar."""
        scalars = nn.functional.silu(gates).unsqueeze(1)
        tensors = self.s2_act(x, None, backend, rows)[:, 1:]
        return torch.cat((scalars.to(tensors.dtype), tensors), dim=1)

    def of_columns(self, hidden: Tensor, channels: int, backend: Backend, rows: int | None = None) -> Tensor:
        """As that of the base class; the C++ kernel reads the columns where they are."""
        grid = self.s2_act.grid
        if not grid.order_by_order or not backend.takes_cpp(hidden.dtype):
            return super().of_columns(hidden, channels, backend, rows)
        return separable_grid_activation(hidden, grid.factors, rows or len(grid.row_of))


class GateActivation(EdgeActivation):
    """SiLU of the scalars, the other degrees times sigmoid gates (Equiformer's gate activation).

    Args:
        degrees: degree of each of the R coefficients, in their sequence.
    """

    def __init__(self, degrees: list[int]) -> None:
        super().__init__()
        self.num_gate_rows = max(degrees)
        self.register_buffer("_gate_of_row", torch.tensor(degrees[1:]) - 1, persistent=False)
        self._gate_of_row: Tensor

    def forward(self, x: Tensor, gates: Tensor, backend: Backend, rows: int | None = None) -> Tensor:
        """`x [B, R, C]`, `gates [B, lmax * C]`; row 0 is the scalar."""
        gates = torch.sigmoid(gates).unflatten(1, (self.num_gate_rows, -1))
        out = torch.cat((nn.functional.silu(x[:, :1]), x[:, 1:] * gates[:, self._gate_of_row]), dim=1)
        return out[:, :rows]


class SwiGLUS2Activation(EdgeActivation):
    """SwiGLU-S2 (EquiformerV3, arXiv 2604.09130): gated product of two functions on the sphere.

    Of two channels of coefficients, x1 and x2, and three scalars a, b and g the outputs are

        y = FromSphere(ToSphere(x1) * ToSphere(x2)) * sigmoid(g), and y_{l=0} + SiLU(a) * b for the scalars.

    A product of degrees up to L has degrees up to 2L and nothing beyond: with more than 3L latitudes and more
    than 3M longitudes, M the highest order, its coefficients are exact and the whole is strictly equivariant,
    which SiLU on the sphere is on no grid.
    """

    num_gate_rows = 3
    inputs_per_channel = 2

    def __init__(self, grid: S2Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor, gates: Tensor, backend: Backend, rows: int | None = None) -> Tensor:
        """`x [B, R, 2 C]` (x1, then x2), `gates [B, 3 C]` (a, b, g) to `[B, R, C]` or to the first `rows`."""
        a, b, g = gates.chunk(3, dim=1)
        product = grid_product(x, self.grid.to_grid, self.grid.from_grid[:rows], backend)
        return add_to_scalars(product * torch.sigmoid(g).unsqueeze(1), nn.functional.silu(a) * b)


def add_to_scalars(x: Tensor, scalars: Tensor) -> Tensor:
    """`x [B, R, C]` with `scalars [B, C]` added to row 0."""
    return torch.cat((x[:, :1] + scalars.unsqueeze(1).to(x.dtype), x[:, 1:]), dim=1)

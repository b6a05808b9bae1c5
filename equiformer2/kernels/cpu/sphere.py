"""Calls of the C++ kernels for the sphere grid. Arguments that it cannot take raise `ValueError`."""

import torch
from torch import Tensor

from equiformer2.kernels.cpu.ctypes_call import arithmetic, call, check
from equiformer2.kernels.cpu.library import LMAX

#: The fields of `kernels.s2_grid.GridFactors`.
Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def separable_activation(hidden: Tensor, factors: Factors, rows: int) -> Tensor:
    """Compute `kernels.s2_grid.separable_grid_activation`, whose arguments these are.

    Raises:
        ValueError: a tensor has another type, shape or layout, or no kernel has such sizes.
    """
    grid = _Grid(factors, hidden.dtype, rows)
    out = hidden.new_empty(len(hidden), rows, grid.channels_of(hidden))
    grid.activate(hidden, None, out, None)
    return out


def separable_activation_backward(hidden: Tensor, factors: Factors, grad_out: Tensor) -> Tensor:
    """Compute the gradient of `hidden` from that of the result of `separable_activation`.

    Raises:
        ValueError: a tensor has another type, shape or layout, or no kernel has such sizes.
    """
    grid = _Grid(factors, hidden.dtype, grad_out.shape[1])
    grad = torch.empty_like(hidden)
    channels = grid.channels_of(hidden)
    check("grad_out", grad_out, hidden.dtype, len(hidden), grad_out.shape[1], channels)
    grid.activate(hidden, grad_out, grad[:, channels:], grad)
    return grad


def to_points(
    x: Tensor, factors: Factors, latitude: Tensor, activate: bool = False, inputs: Tensor | None = None
) -> Tensor:
    """Compute values at the points of the grid.

    Args:
        x: `[n, R, C]` coefficients.
        factors: of the grid.
        latitude: `to_latitude` of the factors, or `from_latitude` for the derivative of `from_points`.
        activate: SiLU of the values instead.
        inputs: `[n, G, C]`, the values times the slope of SiLU at these instead.

    Returns:
        `[n, G, C]`.
    """
    grid = _Grid(factors, x.dtype)
    grid.check_inputs(x, inputs)
    out = x.new_empty(len(x), grid.points, x.shape[2])
    check("x", x, x.dtype, len(x), latitude.shape[1], x.shape[2])
    grid.transform("to_points", latitude, x, inputs, activate, out)
    return out


def from_points(
    points: Tensor,
    factors: Factors,
    latitude: Tensor,
    out: Tensor,
    activate: bool = False,
    inputs: Tensor | None = None,
) -> None:
    """Compute coefficients of functions that are given at the points of the grid; see `to_points`.

    Args:
        points: `[n, G, C]`.
        factors: of the grid.
        latitude: `from_latitude` of the factors, or `to_latitude` for the derivative of `to_points`.
        out: `[n, R, C]`, written.
        activate: of SiLU of the values instead.
        inputs: `[n, G, C]`, of the values times the slope of SiLU at these instead.
    """
    grid = _Grid(factors, points.dtype)
    grid.check_inputs(points, inputs)
    check("points", points, points.dtype, len(points), grid.points, points.shape[2])
    check("out", out, points.dtype, len(points), latitude.shape[1], points.shape[2])
    grid.transform("from_points", latitude, points, inputs, activate, out)


class _Grid:
    """A checked grid and the calls of its kernels.

    Args:
        factors: of the grid.
        dtype: type of the features.
        rows: number of coefficients of a result.

    Raises:
        ValueError: a factor has another type, shape or layout, or no kernel has such sizes.
    """

    def __init__(self, factors: Factors, dtype: torch.dtype, rows: int = 1) -> None:
        to_latitude, from_latitude, longitude, row_starts, row_of = factors
        wide, (latitudes, coefficients) = arithmetic(dtype), to_latitude.shape
        mmax = (longitude.shape[1] - 1) // 2
        check("to_latitude", to_latitude, wide, latitudes, coefficients)
        check("from_latitude", from_latitude, wide, latitudes, coefficients)
        check("longitude", longitude, wide, len(longitude), 2 * mmax + 1)
        check("row_starts", row_starts, torch.int64, 2 * mmax + 2)
        check("row_of", row_of, torch.int64, coefficients)
        if mmax > LMAX or coefficients > (LMAX + 1) ** 2 or not 1 <= rows <= coefficients:
            raise ValueError(
                f"{rows} of {coefficients} coefficients of order {mmax}: the kernel has no such size"
            )
        self._factors, self._mmax, self._rows = factors, mmax, rows
        self.sizes = latitudes, len(longitude), coefficients
        self.points = latitudes * len(longitude)

    def channels_of(self, hidden: Tensor) -> int:
        """Find C of `hidden [B, (1 + R) C]`."""
        return hidden.shape[1] // (1 + self.sizes[2])

    def activate(
        self, hidden: Tensor, grad_out: Tensor | None, out: Tensor, grad_gates: Tensor | None
    ) -> None:
        """Write the activation to `out`, or with `grad_out` the gradient to `out` and `grad_gates`."""
        channels, width = self.channels_of(hidden), hidden.shape[1]
        check("hidden", hidden, hidden.dtype, len(hidden), (1 + self.sizes[2]) * channels)
        # Backward, `out` is a part of the gradient of `hidden`, whose rows are longer.
        stride = self._rows * channels if grad_out is None else width
        sizes = *self.sizes, self._rows
        columns = hidden[:, channels:], hidden, width, grad_out, out, stride, grad_gates
        batch = len(hidden), channels, self._mmax
        call("sphere_activation", hidden.dtype, self._mmax, *self._factors[:4], *sizes, *columns, *batch)

    def check_inputs(self, x: Tensor, inputs: Tensor | None) -> None:
        """Refuse inputs of SiLU that do not fit to the coefficients or points `x`."""
        if inputs is not None:
            check("inputs", inputs, x.dtype, len(x), self.points, x.shape[2])

    def transform(
        self, name: str, latitude: Tensor, x: Tensor, inputs: Tensor | None, activate: bool, out: Tensor
    ) -> None:
        """Run the kernel `to_points` or `from_points` on `x`."""
        check("latitude", latitude, arithmetic(x.dtype), *self._factors[0].shape)
        grid = latitude, *self._factors[2:], *self.sizes
        batch = len(x), x.shape[2], self._mmax
        call(name, x.dtype, self._mmax, *grid, x, inputs, int(activate), out, *batch)

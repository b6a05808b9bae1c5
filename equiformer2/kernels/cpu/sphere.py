"""Calls of the C++ kernels for the sphere grid. Arguments that it cannot take raise `ValueError`."""

import torch
from torch import Tensor

from equiformer2.kernels.cpu.ctypes_call import arithmetic, call, check
from equiformer2.kernels.cpu.library import LMAX

#: The fields of `kernels.s2_grid.GridFactors`.
Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def separable_activation(hidden: Tensor, factors: Factors, rows: int) -> Tensor:
    """`kernels.s2_grid.separable_grid_activation`."""
    out = hidden.new_empty(len(hidden), rows, _channels(hidden, factors))
    _call(hidden, factors, None, out, None)
    return out


def separable_activation_backward(hidden: Tensor, factors: Factors, grad_out: Tensor) -> Tensor:
    """Gradient of `hidden`."""
    grad = torch.empty_like(hidden)
    check("grad_out", grad_out, hidden.dtype, len(hidden), grad_out.shape[1], _channels(hidden, factors))
    _call(hidden, factors, grad_out, grad[:, grad_out.shape[2] :], grad)
    return grad


def _channels(hidden: Tensor, factors: Factors) -> int:
    return hidden.shape[1] // (1 + factors[0].shape[1])


def _call(
    hidden: Tensor, factors: Factors, grad_out: Tensor | None, out: Tensor, grad_gates: Tensor | None
) -> None:
    to_latitude, _, longitude, _, _ = factors
    channels, width = _channels(hidden, factors), hidden.shape[1]
    mmax = (longitude.shape[1] - 1) // 2
    # Forward the rows of `out` are as long as it is; backward `out` is a part of the gradient of `hidden`.
    rows, stride = (out.shape[1], out.shape[1] * channels) if grad_out is None else (grad_out.shape[1], width)
    _check(hidden, factors, mmax, channels, rows)
    sizes = len(to_latitude), len(longitude), to_latitude.shape[1], rows
    columns = hidden[:, channels:], hidden, width, grad_out, out, stride, grad_gates
    call("sphere_activation", hidden.dtype, mmax, *factors[:4], *sizes, *columns, len(hidden), channels, mmax)


def _check(hidden: Tensor, factors: Factors, mmax: int, channels: int, rows: int) -> None:
    coefficients = factors[0].shape[1]
    check("hidden", hidden, hidden.dtype, len(hidden), (1 + coefficients) * channels)
    _check_grid(factors, hidden.dtype, mmax, rows)


def _check_grid(factors: Factors, dtype: torch.dtype, mmax: int, rows: int) -> None:
    to_latitude, from_latitude, longitude, row_starts, row_of = factors
    wide, (latitudes, coefficients) = arithmetic(dtype), to_latitude.shape
    check("to_latitude", to_latitude, wide, latitudes, coefficients)
    check("from_latitude", from_latitude, wide, latitudes, coefficients)
    check("longitude", longitude, wide, len(longitude), 2 * mmax + 1)
    check("row_starts", row_starts, torch.int64, 2 * mmax + 2)
    check("row_of", row_of, torch.int64, coefficients)
    if mmax > LMAX or coefficients > (LMAX + 1) ** 2 or not 1 <= rows <= coefficients:
        raise ValueError(
            f"{rows} of {coefficients} coefficients of order {mmax}: the kernel has no such size"
        )


def to_points(
    x: Tensor, factors: Factors, latitude: Tensor, activate: bool = False, inputs: Tensor | None = None
) -> Tensor:
    """Values at the points of the grid.

    Args:
        x: `[n, R, C]` coefficients.
        factors: of the grid.
        latitude: `to_latitude` of the factors, or `from_latitude` for the derivative of `from_points`.
        activate: SiLU of the values instead.
        inputs: `[n, G, C]`, the values times the slope of SiLU at these instead.

    Returns:
        `[n, G, C]`.
    """
    latitudes, longitudes, mmax = _sizes(x, factors, inputs)
    out = x.new_empty(len(x), latitudes * longitudes, x.shape[2])
    check("x", x, x.dtype, len(x), latitude.shape[1], x.shape[2])
    _transform("to_points", factors, latitude, x, inputs, activate, out, mmax)
    return out


def from_points(
    points: Tensor,
    factors: Factors,
    latitude: Tensor,
    out: Tensor,
    activate: bool = False,
    inputs: Tensor | None = None,
) -> None:
    """Coefficients of functions that are given at the points of the grid; see `to_points`.

    Args:
        points: `[n, G, C]`.
        factors: of the grid.
        latitude: `from_latitude` of the factors, or `to_latitude` for the derivative of `to_points`.
        out: `[n, R, C]`, written.
        activate: of SiLU of the values instead.
        inputs: `[n, G, C]`, of the values times the slope of SiLU at these instead.
    """
    latitudes, longitudes, mmax = _sizes(points, factors, inputs)
    check("points", points, points.dtype, len(points), latitudes * longitudes, points.shape[2])
    check("out", out, points.dtype, len(points), latitude.shape[1], points.shape[2])
    _transform("from_points", factors, latitude, points, inputs, activate, out, mmax)


def _sizes(given: Tensor, factors: Factors, inputs: Tensor | None) -> tuple[int, int, int]:
    """Latitudes, longitudes and the highest order of the grid."""
    latitudes, longitudes, mmax = len(factors[0]), len(factors[2]), (factors[2].shape[1] - 1) // 2
    _check_grid(factors, given.dtype, mmax, rows=1)
    if inputs is not None:
        check("inputs", inputs, given.dtype, len(given), latitudes * longitudes, given.shape[2])
    return latitudes, longitudes, mmax


def _transform(
    name: str,
    factors: Factors,
    latitude: Tensor,
    given: Tensor,
    inputs: Tensor | None,
    activate: bool,
    out: Tensor,
    mmax: int,
) -> None:
    check("latitude", latitude, arithmetic(given.dtype), *factors[0].shape)
    grid = latitude, *factors[2:], len(factors[0]), len(factors[2]), latitude.shape[1]
    call(name, given.dtype, mmax, *grid, given, inputs, int(activate), out, len(given), given.shape[2], mmax)

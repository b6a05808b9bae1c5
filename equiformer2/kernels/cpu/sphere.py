"""Calls of the C++ kernel for the sphere grid. Arguments that it cannot take raise `ValueError`."""

import torch
from torch import Tensor

from equiformer2.kernels.cpu.calls import arithmetic, call, check
from equiformer2.kernels.cpu.library import LMAX

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


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
    to_latitude, _, longitude, _ = factors
    channels, width = _channels(hidden, factors), hidden.shape[1]
    mmax = (longitude.shape[1] - 1) // 2
    # Forward the rows of `out` are as long as it is; backward `out` is a part of the gradient of `hidden`.
    rows, stride = (out.shape[1], out.shape[1] * channels) if grad_out is None else (grad_out.shape[1], width)
    _check(hidden, factors, mmax, channels, rows)
    sizes = len(to_latitude), len(longitude), to_latitude.shape[1], rows
    columns = hidden[:, channels:], hidden, width, grad_out, out, stride, grad_gates
    call("sphere_activation", hidden.dtype, *factors, *sizes, *columns, len(hidden), channels, mmax)


def _check(hidden: Tensor, factors: Factors, mmax: int, channels: int, rows: int) -> None:
    to_latitude, from_latitude, longitude, row_starts = factors
    wide, (latitudes, coefficients) = arithmetic(hidden.dtype), to_latitude.shape
    check("hidden", hidden, hidden.dtype, len(hidden), (1 + coefficients) * channels)
    check("to_latitude", to_latitude, wide, latitudes, coefficients)
    check("from_latitude", from_latitude, wide, latitudes, coefficients)
    check("longitude", longitude, wide, len(longitude), 2 * mmax + 1)
    check("row_starts", row_starts, torch.int64, 2 * mmax + 2)
    if mmax > LMAX or coefficients > (LMAX + 1) ** 2 or not 1 <= rows <= coefficients:
        raise ValueError(
            f"{rows} of {coefficients} coefficients of order {mmax}: the kernel has no such size"
        )

"""Calls of the C++ kernel for the sphere grid."""

import torch
from torch import Tensor

from equiformer2.kernels.cpu.edges import call

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def separable_activation(hidden: Tensor, factors: Factors, rows: int) -> Tensor:
    """`kernels.s2_grid.separable_grid_activation`."""
    out = hidden.new_empty(len(hidden), rows, _channels(hidden, factors))
    _call(hidden, factors, None, out, None)
    return out


def separable_activation_backward(hidden: Tensor, factors: Factors, grad_out: Tensor) -> Tensor:
    """Gradient of `hidden`."""
    grad = torch.empty_like(hidden)
    _call(hidden, factors, grad_out, grad[:, grad_out.shape[2] :], grad)
    return grad


def _channels(hidden: Tensor, factors: Factors) -> int:
    return hidden.shape[1] // (1 + factors[0].shape[1])


def _call(
    hidden: Tensor, factors: Factors, grad_out: Tensor | None, out: Tensor, grad_gates: Tensor | None
) -> None:
    to_latitude, _, longitude, _ = factors
    channels, width = _channels(hidden, factors), hidden.shape[1]
    # Forward the rows of `out` are as long as it is; backward `out` is a part of the gradient of `hidden`.
    rows, stride = (out.shape[1], out.shape[1] * channels) if grad_out is None else (grad_out.shape[1], width)
    sizes = len(to_latitude), len(longitude), to_latitude.shape[1], rows
    columns = hidden[:, channels:], hidden, width, grad_out, out, stride, grad_gates
    mmax = (longitude.shape[1] - 1) // 2
    call("sphere_activation", hidden.dtype, *factors, *sizes, *columns, len(hidden), channels, mmax)

"""The operations of a message with the Triton kernels of `kernels.gpu` between GEMMs.

Large intermediates that are cheap to compute (rotated features, activations, values) are not kept for the
backward pass but computed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from equiformer2.kernels import gpu
from equiformer2.kernels.backend import Neighbors
from equiformer2.kernels.layout import OrderLayout
from equiformer2.kernels.linear import linear
from equiformer2.kernels.so2 import SO2Weights, so2_linear


def convolve_edges(
    x: Tensor,
    packed: Tensor,
    source: Tensor,
    target: Tensor,
    hidden: Tensor,
    radial_weight: Tensor,
    radial_bias: Tensor,
    weights: SO2Weights,
    extra: int,
    lmax: int,
    shared_orders: bool,
    neighbors: Neighbors,
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.convolve_edges`, whose arguments these are; all atoms are targets."""
    radial = torch.nn.functional.linear(hidden, radial_weight, radial_bias)
    mmax = len(weights.orders)
    geometry = (packed.detach(), source, target, lmax, mmax, shared_orders, neighbors)
    terms = weights.terms(radial.dtype)
    out = _RotateAndMultiply.apply(x, radial, geometry, *terms)
    scalars = out[:, : len(weights.scalar)] + weights.bias.to(out.dtype)
    rest = torch.cat((scalars[:, extra:], out[:, len(weights.scalar) :]), dim=1)
    return scalars[:, :extra], rest


class _RotateAndMultiply(torch.autograd.Function):
    """`gather_rotate` and the SO(2) GEMMs; the rotated features are made again for the backward pass."""

    @staticmethod
    def forward(ctx, x, radial, geometry, *terms):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, radial, *terms)
        ctx.geometry = geometry
        lmax, mmax = geometry[3:5]
        return _RotateAndMultiply.multiply(
            _RotateAndMultiply.rotate(x, radial, geometry), terms, lmax, mmax, 2 * x.shape[2]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, radial, *terms = ctx.saved_tensors
        lmax, mmax = ctx.geometry[3:5]
        with torch.enable_grad():
            x, radial = x.detach().requires_grad_(), radial.detach().requires_grad_()
            inputs = _RotateAndMultiply.rotate(x, radial, ctx.geometry)
            # A graph of its own: its backward pass ends at the rotated features.
            leaf = inputs.detach().requires_grad_()
            leaves = [term.detach().requires_grad_() for term in terms]
            out = _RotateAndMultiply.multiply(leaf, leaves, lmax, mmax, 2 * x.shape[2])
        grad_inputs, *grad_terms = torch.autograd.grad(out, [leaf, *leaves], grad)
        grad_x, grad_radial = torch.autograd.grad(inputs, [x, radial], grad_inputs)
        return grad_x, grad_radial, None, *grad_terms

    @staticmethod
    def rotate(x: Tensor, radial: Tensor, geometry: Any) -> Tensor:
        """Gather and rotate the features of both atoms, `[E, R * 2C]`."""
        entries, source, target, lmax, mmax, shared, near = geometry
        return gpu.gather_rotate(x, entries, source, target, radial, lmax, mmax, shared, *near)

    @staticmethod
    def multiply(inputs: Tensor, terms: Any, lmax: int, mmax: int, width: int) -> Tensor:
        """Multiply inputs of `width` channels by the terms of every order."""
        starts = [OrderLayout.first_row(m, lmax) for m in range(mmax + 2)]
        outputs = [linear(inputs[:, : starts[1] * width], terms[0])]
        for m in range(1, mmax + 1):
            pair = inputs[:, starts[m] * width : starts[m + 1] * width]
            positive, negative = pair.chunk(2, dim=1)
            first, second, third = terms[3 * m - 2 : 3 * m + 1]
            common = linear(positive + negative, first)
            outputs += [common - linear(negative, third), common + linear(positive, second)]
        return torch.cat(outputs, dim=1)


def attend(
    hidden: Tensor,
    alpha: Tensor,
    packed: Tensor,
    target: Tensor,
    activation: Any,
    weights: SO2Weights,
    dtype: torch.dtype,
    degrees: tuple[int, int],
    kept: tuple[int, int],
    neighbors: Neighbors,
) -> Tensor:
    """Compute `kernels.attend`, whose arguments these are; `dtype` is that of the GEMMs."""
    rows = OrderLayout(*kept).num_rows

    def values(hidden: Tensor, bias: Tensor, *terms: Tensor) -> Tensor:
        return so2_linear(activation(hidden).to(dtype), terms, bias, degrees[0]).unflatten(1, (rows, -1))

    terms = weights.terms(dtype)

    def total(hidden: Tensor, alpha: Tensor, bias: Tensor, *terms: Tensor) -> Tensor:
        return sum_rotated(values(hidden, bias, *terms), alpha, packed, target, degrees, kept, neighbors)

    if not torch.is_grad_enabled():
        return total(hidden, alpha, weights.bias, *terms)
    out: Tensor = checkpoint(
        total, hidden, alpha, weights.bias, *terms, use_reentrant=False, preserve_rng_state=False
    )
    return out


def sum_rotated(
    values: Tensor,
    alpha: Tensor | None,
    packed: Tensor,
    target: Tensor,
    degrees: tuple[int, int],
    kept: tuple[int, int],
    neighbors: Neighbors,
) -> Tensor:
    """Compute `gpu.rotate_aggregate` of values `[E, R, C]` up to the degree and order `kept`."""
    scale = [1.0] * (kept[0] + 1)
    sizes = kept[0], degrees[1], kept[1], scale
    return gpu.rotate_aggregate(values, alpha, packed.detach(), target, neighbors.target_starts, *sizes)

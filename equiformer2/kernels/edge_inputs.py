"""What stands before the first GEMMs of a message: gather, rotate into the edge frame, radial weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from equiformer2.kernels.chunks import cached_chunks, take_rows
from equiformer2.kernels.cpu import edges as cpu
from equiformer2.kernels.cpu.ctypes_call import widths_per_order
from equiformer2.kernels.linear import linear
from equiformer2.kernels.rotation import m_major_starts, order_rows, rotation_matrices
from equiformer2.kernels.rows import add_rows_
from equiformer2.kernels.scratch_buffers import scratch
from equiformer2.kernels.so2 import gauss_sum_backward, gauss_triple


class Edges(NamedTuple):
    """The tensors of `convolve_edges`, in its order."""

    x: Tensor
    x_target: Tensor
    packed: Tensor
    source: Tensor
    target: Tensor
    hidden: Tensor
    radial_weight: Tensor
    radial_bias: Tensor

    def part(self, part: slice) -> "Edges":
        """Some of the edges, all of the atoms."""
        return self._replace(
            packed=self.packed[part],
            source=self.source[part],
            target=self.target[part],
            hidden=self.hidden[part],
        )


class InputOptions(NamedTuple):
    """How the inputs are made.

    Attributes:
        degrees: highest degree and order.
        shared_orders: whether all orders of a degree share their radial weights.
        cpp: whether the C++ kernels are used.
    """

    degrees: tuple[int, int]
    shared_orders: bool
    cpp: bool


def edge_inputs(edges: Edges, options: InputOptions, radial: Tensor | None = None) -> list[Tensor]:
    """GEMM inputs (see `so2.gauss_triple`) `radial_m * rotate([x_source, x_target])_m` of some edges.

    Those of the C++ kernels are valid until the next call in this thread.

    Args:
        edges: the edges.
        options: how.
        radial: `[e, P]` radial weights before their bias is added, where the caller needs them, too.
    """
    if options.cpp:
        return _written_inputs(edges, options, radial)
    lmax, mmax = options.degrees
    if radial is None:
        radial = linear(edges.hidden, edges.radial_weight)
    pairs, _ = _rotated_pairs(edges, options.degrees)
    radial = radial + edges.radial_bias
    out = []
    for m in range(mmax + 1):
        inputs = _products(pairs, radial, lmax, m, options.shared_orders)
        out += [inputs[:, 0]] if m == 0 else gauss_triple(inputs[:, 0], inputs[:, 1])
    return out


def _written_inputs(edges: Edges, options: InputOptions, radial: Tensor | None) -> list[Tensor]:
    """By the C++ kernel; radial weights that nobody else needs are read while they are in the cache."""
    widths = widths_per_order(options.degrees, 2 * edges.x.shape[2])
    out = scratch("edge inputs", len(edges.source), widths, edges.hidden.dtype)
    bytes_per_edge = edges.hidden.element_size() * len(edges.radial_weight)
    for part in cached_chunks(len(edges.source), bytes_per_edge, edges.x.device):
        some = edges.part(part)
        weights = linear(some.hidden, edges.radial_weight) if radial is None else radial[part]
        cpu.gather_rotate(*_tensors(some), weights, edges.radial_bias, *options[:2], [t[part] for t in out])
    return out


def edge_inputs_backward(
    edges: Edges,
    radial: Tensor,
    grads: list[Tensor],
    grad_x: Tensor,
    grad_x_target: Tensor,
    options: InputOptions,
) -> Tensor:
    """Adds to the gradients of the features of sources and targets; returns that of the radial weights.

    That of the C++ kernels is valid until the next call in this thread.
    """
    lmax, mmax = options.degrees
    if options.cpp:
        arguments = *_tensors(edges), radial, edges.radial_bias
        (grad_radial,) = scratch("radial gradient", len(radial), [radial.shape[1]], radial.dtype)
        totals = grad_x, grad_x_target
        return cpu.gather_rotate_backward(*arguments, grads, *totals, *options[:2], grad_radial)
    pairs, matrices = _rotated_pairs(edges, options.degrees)
    radial = radial + edges.radial_bias
    grad_radial = torch.zeros_like(radial)
    grad_pairs = [torch.empty_like(side) for side in pairs]
    for m in range(mmax + 1):
        grad = torch.stack(gauss_sum_backward(grads, m), dim=1)
        factors = radial, grad_radial
        _products_backward(pairs, grad_pairs, *factors, grad, lmax, m, options.shared_orders)
    back = matrices.transpose(1, 2)
    add_rows_(grad_x, edges.source, torch.bmm(back, grad_pairs[0]).to(grad_x.dtype))
    add_rows_(grad_x_target, edges.target, torch.bmm(back, grad_pairs[1]).to(grad_x.dtype))
    return grad_radial


def _tensors(edges: Edges) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return edges.x, edges.x_target, edges.source, edges.target, edges.packed


def _rotated_pairs(edges: Edges, degrees: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    """Features of the sources and of the targets in the edge frames, and the matrices."""
    matrices = rotation_matrices(edges.packed, degrees)
    sides = (edges.x, edges.source), (edges.x_target, edges.target)
    return [torch.bmm(matrices, take_rows(features, index)) for features, index in sides], matrices


def order_of(rotated: Tensor, lmax: int, m: int) -> Tensor:
    """The rows of order m of an m-major tensor as `[E, 1 or 2, L+1-m, C]`."""
    components, degrees = order_rows(lmax, m)
    start = m_major_starts(lmax, m)[m]
    return rotated[:, start : start + components * degrees].unflatten(1, (components, degrees))


def radial_of(radial: Tensor, width: int, lmax: int, m: int, shared_orders: bool) -> Tensor:
    """The radial weights of order m as `[E, 1, L+1-m, width]`."""
    first = m if shared_orders else sum(lmax + 1 - k for k in range(m))
    degrees = lmax + 1 - m
    return radial[:, first * width : (first + degrees) * width].unflatten(1, (1, degrees, width))


def _products(pairs: list[Tensor], radial: Tensor, lmax: int, m: int, shared: bool) -> Tensor:
    """Inputs `[e, 1 or 2, (L+1-m) 2C]` of order m, the channels of source and target side by side."""
    channels = pairs[0].shape[2]
    components, degrees = order_rows(lmax, m)
    scale = radial_of(radial, 2 * channels, lmax, m, shared)
    out = radial.new_empty(len(radial), components, degrees, 2 * channels)
    for side, columns in zip(pairs, (slice(channels), slice(channels, None)), strict=True):
        torch.mul(order_of(side, lmax, m), scale[..., columns], out=out[..., columns])
    return out.flatten(2)


def _products_backward(
    pairs: list[Tensor],
    grad_pairs: list[Tensor],
    radial: Tensor,
    grad_radial: Tensor,
    grad: Tensor,
    lmax: int,
    m: int,
    shared: bool,
) -> None:
    """Gradients of both factors of `_products`; that of the radial weights is added: orders may share it."""
    channels = pairs[0].shape[2]
    grad = grad.unflatten(2, (-1, 2 * channels))
    scale, grad_scale = (radial_of(t, 2 * channels, lmax, m, shared) for t in (radial, grad_radial))
    for side, grad_side, columns in zip(
        pairs, grad_pairs, (slice(channels), slice(channels, None)), strict=True
    ):
        torch.mul(grad[..., columns], scale[..., columns], out=order_of(grad_side, lmax, m))
        grad_scale[..., columns] += (grad[..., columns] * order_of(side, lmax, m)).sum(1, keepdim=True)

"""First half of a message: gather both atoms, rotate into the edge frame, radial weights, SO(2) GEMMs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equiformer2.kernels import triton_path
from equiformer2.kernels.backend import plain_expressions, triton_neighbors
from equiformer2.kernels.chunks import cast_to_autocast, chunks, no_autocast, take_rows
from equiformer2.kernels.linear import linear
from equiformer2.kernels.rotation import m_major_starts, order_rows, rotation_matrices
from equiformer2.kernels.rows import gather_rows
from equiformer2.kernels.so2 import SO2Weights, complex_linear, complex_terms


class _Edges(NamedTuple):
    """The tensors of `convolve_edges`, in its order."""

    x: Tensor
    x_target: Tensor
    packed: Tensor
    source: Tensor
    target: Tensor
    hidden: Tensor
    radial_weight: Tensor
    radial_bias: Tensor


def convolve_edges(
    x: Tensor,
    x_target: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """SO(2) convolution of the concatenated source and target features (paper section 4.1 and Figure 1b).

    Per edge and order m the inputs are `radial_m * rotate([x_source, x_target])_m`, flattened to (l, 2C).
    Neither the gathered `[E, K, 2C]` nor the rotated `[E, R, 2C]` tensor nor the radial weights are stored.

    Args:
        x: `[N, K, C]` features of the source atoms.
        x_target: `[N', K, C]` features of the target atoms; `x` itself if all atoms are targets.
        packed: Wigner-D entries of the edges (see `kernels.rotation`), orders as in `weights`.
        source, target: `[E]` atom indices.
        hidden: `[E, D]` last hidden layer of the radial function.
        radial_weight, radial_bias: `[P, D]`, `[P]` its last linear layer. P counts (m, l, 2C) inputs,
            or (l, 2C) when `shared_orders` (all m of one degree share their radial weights).
        weights: the SO(2) linear maps.
        extra: how many outputs of m = 0 are scalars of their own rather than coefficients.
        lmax: degree of `x`.

    Returns:
        `[E, extra]` and the other outputs side by side, m-major `[E, W]`.
    """
    hidden, radial_weight, radial_bias = cast_to_autocast(hidden, radial_weight, radial_bias)
    edges = _Edges(x, x_target, packed, source, target, hidden, radial_weight, radial_bias)
    neighbors = triton_neighbors()
    with no_autocast(x):
        if neighbors is not None:
            options = weights, extra, lmax, shared_orders
            return triton_path.convolve_edges(x, *edges[2:], *options, neighbors)
        if plain_expressions(packed.requires_grad):
            return _plain(edges, weights, extra, lmax, shared_orders)
        if not torch.is_grad_enabled():
            return _streamed(edges, weights, extra, lmax, shared_orders)
        return _ConvolveEdges.apply(extra, lmax, shared_orders, *edges, *weights.flat)


def _plain(edges: _Edges, weights: SO2Weights, extra: int, lmax: int, shared: bool) -> tuple[Tensor, Tensor]:
    """The same under ordinary autograd."""
    matrices = rotation_matrices(edges.packed, (lmax, len(weights.orders)))
    sides = ((edges.x, edges.source), (edges.x_target, edges.target))
    rotated = torch.cat([torch.bmm(matrices, gather_rows(x, index)) for x, index in sides], dim=2)
    radial = torch.nn.functional.linear(edges.hidden, edges.radial_weight, edges.radial_bias)
    outputs = []
    for m, weight in enumerate(weights.terms(radial.dtype)):
        product = _order(rotated, lmax, m) * _radial(radial, rotated.shape[2], lmax, m, shared)
        inputs = product.flatten(2).to(weight.dtype)
        if m == 0:
            scalars = linear(inputs[:, 0], weight) + weights.bias.to(weight.dtype)
            outputs.append(scalars[:, extra:])
        else:
            outputs.append(complex_linear(inputs[:, 0], inputs[:, 1], weight))
    return scalars[:, :extra], torch.cat(outputs, dim=1)


def _streamed(
    edges: _Edges, weights: SO2Weights, extra: int, lmax: int, shared: bool
) -> tuple[Tensor, Tensor]:
    """The same chunk by chunk, without derivatives."""
    edges = _rounded(edges)
    terms = weights.terms(edges.hidden.dtype)
    widths = [len(weights.scalar), *(len(weight) for weight in weights.orders)]
    scalars = edges.hidden.new_empty(len(edges.source), extra)
    out = edges.hidden.new_empty(len(edges.source), sum(widths) - extra)
    bias = weights.bias.to(out.dtype)
    for part in _parts(edges):
        pairs, _, radial = _rotated_pairs(edges, part, lmax, len(weights.orders))
        column = widths[0] - extra
        for m, w in enumerate(terms):
            inputs = _inputs(pairs, radial, lmax, m, shared)
            if m == 0:
                result = linear(inputs[:, 0], w)
                torch.add(result[:, :extra], bias[:extra], out=scalars[part])
                torch.add(result[:, extra:], bias[extra:], out=out[part, :column])
                continue
            common, plus, minus = complex_terms(inputs[:, 0], inputs[:, 1], w)
            half = w.shape[1]
            torch.sub(common, minus, out=out[part, column : column + half])
            torch.add(common, plus, out=out[part, column + half : column + 2 * half])
            column += 2 * half
    return scalars, out


def _order(rotated: Tensor, lmax: int, m: int) -> Tensor:
    """The rows of order m of an m-major tensor as `[E, 1 or 2, L+1-m, C]`."""
    components, degrees = order_rows(lmax, m)
    start = m_major_starts(lmax, m)[m]
    return rotated[:, start : start + components * degrees].unflatten(1, (components, degrees))


def _radial(radial: Tensor, width: int, lmax: int, m: int, shared_orders: bool) -> Tensor:
    """The radial weights of order m as `[E, 1, L+1-m, width]`."""
    first = m if shared_orders else sum(lmax + 1 - k for k in range(m))
    degrees = lmax + 1 - m
    return radial[:, first * width : (first + degrees) * width].unflatten(1, (1, degrees, width))


class _ConvolveEdges(torch.autograd.Function):
    @staticmethod
    def forward(ctx, extra, lmax, shared, *tensors):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*tensors)
        ctx.extra, ctx.lmax, ctx.shared = extra, lmax, shared
        edges, weights = _Edges(*tensors[:8]), SO2Weights.from_flat(tensors[8:])
        return _streamed(edges, weights, extra, lmax, shared)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scalars, grad_out):  # type: ignore[no-untyped-def]
        tensors = ctx.saved_tensors
        edges, weights = _Edges(*tensors[:8]), SO2Weights.from_flat(tensors[8:])
        terms = weights.terms(edges.hidden.dtype)
        lmax, channels = ctx.lmax, edges.x.shape[2]
        grad_x, grad_x_target = torch.zeros_like(edges.x), torch.zeros_like(edges.x_target)
        edges = _rounded(edges)
        grad_hidden = torch.empty_like(edges.hidden)
        # Weight gradients are sums over all edges: collected in float32 also when the GEMMs run in bf16.
        grad_radial_weight, grad_radial_bias = _zeros(edges.radial_weight), _zeros(edges.radial_bias)
        grad_terms = [_zeros(w) for w in terms]
        grad_bias = torch.cat([grad_scalars.sum(0), grad_out[:, : len(weights.bias) - ctx.extra].sum(0)])
        for part in _parts(edges, 2):
            pairs, matrices, radial = _rotated_pairs(edges, part, lmax, len(weights.orders))
            grad_pairs = [torch.empty_like(side) for side in pairs]
            grad_radial = torch.zeros_like(radial)
            column = 0
            for m, (w, grad_w) in enumerate(zip(terms, grad_terms, strict=True)):
                inputs = _inputs(pairs, radial, lmax, m, ctx.shared)
                if m == 0:
                    width = len(w) - ctx.extra
                    grad = torch.cat((grad_scalars[part], grad_out[part, :width]), dim=1)
                else:
                    width = 2 * w.shape[1]
                    grad = grad_out[part, column : column + width]
                column += width
                grad_inputs = _linear_backward(w, inputs, grad.to(w.dtype), grad_w)
                scale = _radial(radial, 2 * channels, lmax, m, ctx.shared)
                grad_scale = _radial(grad_radial, 2 * channels, lmax, m, ctx.shared)
                shape = (len(grad), order_rows(lmax, m)[0], -1, 2 * channels)
                _product_backward(pairs, scale, grad_inputs.view(shape), grad_pairs, grad_scale, lmax, m)
            _accumulate(grad_radial_weight, grad_radial.t(), edges.hidden[part])
            grad_radial_bias += grad_radial.sum(0)
            grad_hidden[part] = linear(grad_radial, edges.radial_weight.t())
            back = matrices.transpose(1, 2)
            grad_x.index_add_(0, edges.source[part], torch.bmm(back, grad_pairs[0]).to(grad_x.dtype))
            grad_x_target.index_add_(0, edges.target[part], torch.bmm(back, grad_pairs[1]).to(grad_x.dtype))
        return (
            *(None, None, None),
            grad_x,
            grad_x_target,
            *(None, None, None),
            grad_hidden,
            grad_radial_weight.to(edges.radial_weight.dtype),
            grad_radial_bias.to(edges.radial_bias.dtype),
            *_weight_gradients(weights, grad_terms, grad_bias),
        )


def _weight_gradients(weights: SO2Weights, grad_terms: list[Tensor], grad_bias: Tensor) -> list[Tensor]:
    scalar, *orders = SO2Weights.gradients(grad_terms)
    return [g.to(w.dtype) for g, w in zip((scalar, grad_bias, *orders), weights.flat, strict=True)]


def _rounded(edges: _Edges) -> _Edges:
    """Everything in the precision of the GEMMs: what they take would be rounded to it anyway."""
    x, x_target, packed = (t.to(edges.hidden.dtype) for t in (edges.x, edges.x_target, edges.packed))
    return edges._replace(x=x, x_target=x_target, packed=packed)


def _parts(edges: _Edges, factor: int = 1) -> Iterator[slice]:
    per_edge = 4 * (3 * edges.x.shape[1] * 2 * edges.x.shape[2] + 2 * edges.radial_weight.shape[0])
    return chunks(len(edges.source), factor * per_edge, edges.x.device)


def _rotated_pairs(edges: _Edges, part: slice, lmax: int, mmax: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Features of the sources and of the targets in the edge frames, the matrices, the radial weights."""
    matrices = rotation_matrices(edges.packed[part], (lmax, mmax))
    pairs = [
        torch.bmm(matrices, take_rows(features, index[part]))
        for features, index in ((edges.x, edges.source), (edges.x_target, edges.target))
    ]
    radial = linear(edges.hidden[part], edges.radial_weight).add_(edges.radial_bias)
    return pairs, matrices, radial


def _inputs(pairs: list[Tensor], radial: Tensor, lmax: int, m: int, shared: bool) -> Tensor:
    """Inputs `[e, 1 or 2, (L+1-m) 2C]` of order m, the channels of source and target side by side."""
    channels = pairs[0].shape[2]
    components, degrees = order_rows(lmax, m)
    scale = _radial(radial, 2 * channels, lmax, m, shared)
    out = radial.new_empty(len(radial), components, degrees, 2 * channels)
    for side, columns in zip(pairs, (slice(channels), slice(channels, None)), strict=True):
        torch.mul(_order(side, lmax, m), scale[..., columns], out=out[..., columns])
    return out.flatten(2)


def _product_backward(
    pairs: list[Tensor],
    scale: Tensor,
    grad: Tensor,
    grad_pairs: list[Tensor],
    grad_scale: Tensor,
    lmax: int,
    m: int,
) -> None:
    """Gradients of both factors of `_inputs`; that of the radial weights is added: orders may share them."""
    channels = pairs[0].shape[2]
    for side, grad_side, columns in zip(
        pairs, grad_pairs, (slice(channels), slice(channels, None)), strict=True
    ):
        torch.mul(grad[..., columns], scale[..., columns], out=_order(grad_side, lmax, m))
        row, view = _order(side, lmax, m), grad_scale[:, 0, :, columns]
        first = grad[:, 0, :, columns] * row[:, 0]
        if grad.shape[1] == 2:
            first.addcmul_(grad[:, 1, :, columns], row[:, 1])
        view += first


def _linear_backward(w: Tensor, inputs: Tensor, grad: Tensor, grad_w: Tensor) -> Tensor:
    """Gradient of the inputs `[e, 1 or 2, in]` of one order; that of the weights is added to `grad_w`."""
    if w.dim() == 2:
        _accumulate(grad_w, grad.t(), inputs[:, 0])
        return linear(grad, w.t()).unsqueeze(1)
    positive, negative = inputs.unbind(1)
    grad_positive, grad_negative = grad.chunk(2, dim=1)
    both = grad_positive + grad_negative
    _accumulate(grad_w[0], both.t(), positive + negative)
    _accumulate(grad_w[1], grad_negative.t(), positive)
    _accumulate(grad_w[2], grad_positive.t(), negative, sign=-1)
    common = linear(both, w[0].t())
    out = torch.empty_like(inputs)
    torch.add(common, linear(grad_negative, w[1].t()), out=out[:, 0])
    torch.sub(common, linear(grad_positive, w[2].t()), out=out[:, 1])
    return out


def _accumulate(total: Tensor, left: Tensor, right: Tensor, sign: int = 1) -> None:
    """`total += sign * left @ right`, without a temporary where the precisions allow it."""
    if total.dtype == right.dtype:
        total.addmm_(left, right, alpha=sign)
    else:
        total.add_(torch.mm(left, right), alpha=sign)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))

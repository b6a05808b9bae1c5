"""First half of a message: gather both atoms, rotate into the edge frame, radial weights, SO(2) GEMMs."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equiformer2.kernels import triton_path
from equiformer2.kernels.backend import Backend, Neighbors
from equiformer2.kernels.chunks import cast_to_autocast, chunks, no_autocast
from equiformer2.kernels.edge_inputs import (
    Edges,
    InputOptions,
    edge_inputs,
    edge_inputs_backward,
    order_of,
    radial_of,
)
from equiformer2.kernels.linear import linear
from equiformer2.kernels.rotation import rotation_matrices
from equiformer2.kernels.rows import gather_rows
from equiformer2.kernels.so2 import (
    SO2Weights,
    accumulate,
    complex_linear,
    gauss_gradients,
    gauss_values,
    products_backward,
)


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
    backend: Backend,
    neighbors: Neighbors | None = None,
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
        shared_orders: see `radial_weight`.
        backend: the implementation.
        neighbors: of the edges, for the backend `triton`, which runs where they are given.

    Returns:
        `[E, extra]` and the other outputs side by side, m-major `[E, W]`.
    """
    hidden, radial_weight, radial_bias = cast_to_autocast(hidden, radial_weight, radial_bias)
    edges = Edges(x, x_target, packed, source, target, hidden, radial_weight, radial_bias)
    with no_autocast(x):
        if neighbors is not None:
            return triton_path.convolve_edges(x, *edges[2:], weights, extra, lmax, shared_orders, neighbors)
        if backend.takes_expressions(packed.requires_grad):
            return _plain(edges, weights, extra, lmax, shared_orders)
        options = InputOptions((lmax, len(weights.orders)), shared_orders, backend.takes_cpp(hidden.dtype))
        if not torch.is_grad_enabled():
            return _streamed(edges, weights, extra, options)
        return _ConvolveEdges.apply(extra, options, *edges, *weights.flat)


def _plain(edges: Edges, weights: SO2Weights, extra: int, lmax: int, shared: bool) -> tuple[Tensor, Tensor]:
    """The same under ordinary autograd."""
    matrices = rotation_matrices(edges.packed, (lmax, len(weights.orders)))
    sides = ((edges.x, edges.source), (edges.x_target, edges.target))
    rotated = torch.cat([torch.bmm(matrices, gather_rows(x, index)) for x, index in sides], dim=2)
    radial = torch.nn.functional.linear(edges.hidden, edges.radial_weight, edges.radial_bias)
    outputs = []
    terms = weights.terms(radial.dtype)
    for m in range(len(weights.orders) + 1):
        product = order_of(rotated, lmax, m) * radial_of(radial, rotated.shape[2], lmax, m, shared)
        inputs = product.flatten(2).to(radial.dtype)
        if m == 0:
            scalars = linear(inputs[:, 0], terms[0]) + weights.bias.to(radial.dtype)
            outputs.append(scalars[:, extra:])
        else:
            outputs.append(complex_linear(inputs[:, 0], inputs[:, 1], terms[3 * m - 2 : 3 * m + 1]))
    return scalars[:, :extra], torch.cat(outputs, dim=1)


def _streamed(edges: Edges, weights: SO2Weights, extra: int, options: InputOptions) -> tuple[Tensor, Tensor]:
    """The same chunk by chunk, without derivatives."""
    edges = _prepared(edges, options)
    terms = weights.terms(edges.hidden.dtype)
    bias, first = weights.bias.to(edges.hidden.dtype), len(weights.scalar) - extra
    scalars = edges.hidden.new_empty(len(edges.source), extra)
    out = edges.hidden.new_empty(len(edges.source), first + sum(len(weight) for weight in weights.orders))
    for part in _parts(edges, options):
        inputs = edge_inputs(edges.part(part), options)
        result, *others = (linear(x, term) for x, term in zip(inputs, terms, strict=True))
        torch.add(result[:, :extra], bias[:extra], out=scalars[part])
        gauss_values([result[:, extra:], *others], bias[extra:], out[part])
    return scalars, out


class _ConvolveEdges(torch.autograd.Function):
    @staticmethod
    def forward(ctx, extra, options, *tensors):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*tensors)
        ctx.extra, ctx.options = extra, options
        return _streamed(Edges(*tensors[:8]), SO2Weights.from_flat(tensors[8:]), extra, options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scalars, grad_out):  # type: ignore[no-untyped-def]
        tensors, options = ctx.saved_tensors, ctx.options
        edges, weights = Edges(*tensors[:8]), SO2Weights.from_flat(tensors[8:])
        terms = weights.terms(edges.hidden.dtype)
        grad_x = torch.zeros_like(edges.x, memory_format=torch.contiguous_format)
        # Where all atoms are targets both sides share one sum.
        same = edges.x.shape == edges.x_target.shape and edges.x.data_ptr() == edges.x_target.data_ptr()
        grad_x_target = grad_x
        if not same:
            grad_x_target = torch.zeros_like(edges.x_target, memory_format=torch.contiguous_format)
        edges = _prepared(edges, options)
        grad_hidden = torch.empty_like(edges.hidden)
        # Weight gradients are sums over all edges: collected in float32 also when the GEMMs run in bf16.
        grad_radial_weight, grad_radial_bias = _zeros(edges.radial_weight), _zeros(edges.radial_bias)
        grad_terms = [_zeros(w) for w in terms]
        grad_bias = torch.cat([grad_scalars.sum(0), grad_out[:, : len(weights.bias) - ctx.extra].sum(0)])
        for part in _parts(edges, options):
            some = edges.part(part)
            radial = linear(some.hidden, edges.radial_weight)
            inputs = edge_inputs(some, options, radial)
            grads = _product_gradients(grad_scalars[part], grad_out[part], terms)
            grads = products_backward(inputs, grads, terms, grad_terms)
            del inputs
            grad_radial = edge_inputs_backward(some, radial, grads, grad_x, grad_x_target, options)
            accumulate(grad_radial_weight, grad_radial.t(), some.hidden)
            grad_radial_bias += grad_radial.sum(0)
            grad_hidden[part] = linear(grad_radial, edges.radial_weight.t())
        scalar, *orders = SO2Weights.gradients(grad_terms)
        of_weights = scalar, grad_bias, *orders
        return (
            *(None, None),
            grad_x,
            None if same else grad_x_target,
            *(None, None, None),
            grad_hidden,
            grad_radial_weight.to(edges.radial_weight.dtype),
            grad_radial_bias.to(edges.radial_bias.dtype),
            *(grad.to(w.dtype) for grad, w in zip(of_weights, weights.flat, strict=True)),
        )


def _product_gradients(grad_scalars: Tensor, grad_out: Tensor, terms: list[Tensor]) -> list[Tensor]:
    """Gradients of the products of all GEMMs from those of the outputs of some edges."""
    dtype, first = terms[0].dtype, len(terms[0]) - grad_scalars.shape[1]
    of_scalars = torch.cat((grad_scalars, grad_out[:, :first]), dim=1).to(dtype)
    return [of_scalars, *gauss_gradients(grad_out[:, first:].to(dtype), [len(t) for t in terms[1:]])]


def _prepared(edges: Edges, options: InputOptions) -> Edges:
    """As the loops take it: contiguous; rounded to the precision of the GEMMs before, not after, rotation.

    The C++ kernels compute in float32 at least and round their results.
    """
    dtype = edges.hidden.dtype
    if options.cpp:
        dtype = torch.promote_types(dtype, torch.float32)
        return Edges(*(t.to(dtype).contiguous() for t in edges[:3]), *(t.contiguous() for t in edges[3:]))
    return edges._replace(**{name: getattr(edges, name).to(dtype) for name in ("x", "x_target", "packed")})


def _parts(edges: Edges, options: InputOptions) -> Iterator[slice]:
    """As many edges as fill a chunk with their GEMM inputs and radial weights."""
    lmax, mmax = options.degrees
    rows = lmax + 1 + 3 * sum(lmax + 1 - m for m in range(1, mmax + 1))
    numbers = rows * 2 * edges.x.shape[2] + len(edges.radial_weight)
    return chunks(len(edges.source), edges.hidden.element_size() * numbers, edges.x.device)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))

"""First half of a message: gather both atoms, rotate into the edge frame, radial weights, SO(2) GEMMs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equiformer2.kernels import triton_path
from equiformer2.kernels.backend import Backend, Neighbors
from equiformer2.kernels.chunks import cast_to_autocast, chunks, no_autocast, take_rows
from equiformer2.kernels.cpu import edges as cpu
from equiformer2.kernels.cpu.ctypes_call import widths_per_order
from equiformer2.kernels.layout import OrderLayout
from equiformer2.kernels.linear import linear
from equiformer2.kernels.rotation import rotation_matrices
from equiformer2.kernels.rows import add_rows_, gather_rows
from equiformer2.kernels.scratch_buffers import scratch
from equiformer2.kernels.so2 import (
    SO2Weights,
    accumulate,
    complex_linear,
    gauss_gradients,
    gauss_triple,
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
        extra: number of outputs of m = 0 that are scalars of their own rather than coefficients.
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
            return _ConvolveEdges.expression(edges, weights, extra, lmax, shared_orders)
        options = InputOptions((lmax, len(weights.orders)), shared_orders, backend.takes_cpp(hidden.dtype))
        if not torch.is_grad_enabled():
            return _ConvolveEdges.stream(edges, weights, extra, options)
        return _ConvolveEdges.apply(extra, options, *edges, *weights.flat)


class InputOptions(NamedTuple):
    """Choices for the inputs of the GEMMs.

    Attributes:
        degrees: highest degree and order.
        shared_orders: all orders of a degree share their radial weights.
        cpp: use the C++ kernels.
    """

    degrees: tuple[int, int]
    shared_orders: bool
    cpp: bool


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
        """Take some of the edges, and all atoms."""
        return self._replace(
            packed=self.packed[part],
            source=self.source[part],
            target=self.target[part],
            hidden=self.hidden[part],
        )

    def prepared(self, options: InputOptions) -> "Edges":
        """Make them as the loops take them: contiguous, features and rotations in the precision of the GEMMs.

        They are rounded before, not after, the rotation. The C++ kernels compute in float32 at least and
        round their results.
        """
        dtype = self.hidden.dtype
        if options.cpp:
            dtype = torch.promote_types(dtype, torch.float32)
            return Edges(*(t.to(dtype).contiguous() for t in self[:3]), *(t.contiguous() for t in self[3:]))
        return self._replace(**{name: getattr(self, name).to(dtype) for name in ("x", "x_target", "packed")})

    def chunks(self, options: InputOptions) -> Iterator[slice]:
        """Cut the edges so that a chunk holds the GEMM inputs and the radial weights of its edges."""
        lmax, mmax = options.degrees
        rows = lmax + 1 + 3 * sum(lmax + 1 - m for m in range(1, mmax + 1))
        numbers = rows * 2 * self.x.shape[2] + len(self.radial_weight)
        return chunks(len(self.source), self.hidden.element_size() * numbers, self.x.device)

    def inputs(self, options: InputOptions, radial: Tensor | None = None) -> list[Tensor]:
        """Compute the GEMM inputs `radial_m * rotate([x_source, x_target])_m` (see `so2.gauss_triple`).

        Args:
            options: choices for the inputs.
            radial: `[e, P]` radial weights before their bias is added, where the caller needs them, too.

        Returns:
            Tensors `[e, (L+1-m) 2C]`. Those of the C++ kernels are valid until the next call in this thread.
        """
        (lmax, mmax), shared, cpp = options
        channels = self.x.shape[2]
        if cpp:
            widths = widths_per_order(options.degrees, 2 * channels)
            out = scratch("edge inputs", len(self.source), widths, self.hidden.dtype)
            bytes_per_edge = self.hidden.element_size() * len(self.radial_weight)
            # Radial weights that nobody else needs are read while they are in the cache.
            for part in chunks(len(self.source), bytes_per_edge, self.x.device, "cached"):
                some = self.part(part)
                weights = linear(some.hidden, self.radial_weight) if radial is None else radial[part]
                parts = [t[part] for t in out]
                cpu.gather_rotate(*some._geometry, weights, self.radial_bias, options.degrees, shared, parts)
            return out
        if radial is None:
            radial = linear(self.hidden, self.radial_weight)
        pairs, _ = self._rotated_pairs(options.degrees)
        radial = radial + self.radial_bias
        out = []
        for m in range(mmax + 1):
            scale = radial_of(radial, 2 * channels, lmax, m, shared)
            product = radial.new_empty(len(radial), 1 if m == 0 else 2, lmax + 1 - m, 2 * channels)
            # The channels of source and target side by side.
            for side, columns in zip(pairs, (slice(channels), slice(channels, None)), strict=True):
                torch.mul(order_of(side, lmax, m), scale[..., columns], out=product[..., columns])
            signs = product.flatten(2)
            out += [signs[:, 0]] if m == 0 else gauss_triple(signs[:, 0], signs[:, 1])
        return out

    def inputs_backward(
        self,
        radial: Tensor,
        grads: list[Tensor],
        grad_x: Tensor,
        grad_x_target: Tensor,
        options: InputOptions,
    ) -> Tensor:
        """Differentiate `inputs`.

        Args:
            radial: `[e, P]` radial weights before their bias is added.
            grads: gradients of the inputs.
            grad_x, grad_x_target: `[N, K, C]` and `[N', K, C]`; the gradients of the features are added.
            options: those of the inputs.

        Returns:
            `[e, P]`, the gradient of the radial weights. That of the C++ kernels is valid until the next
            call in this thread.
        """
        (lmax, mmax), shared, cpp = options
        if cpp:
            (grad_radial,) = scratch("radial gradient", len(radial), [radial.shape[1]], radial.dtype)
            arguments = *self._geometry, radial, self.radial_bias, grads, grad_x, grad_x_target
            return cpu.gather_rotate_backward(*arguments, options.degrees, shared, grad_radial)
        pairs, matrices = self._rotated_pairs(options.degrees)
        channels = self.x.shape[2]
        radial = radial + self.radial_bias
        grad_radial = torch.zeros_like(radial)
        grad_pairs = [torch.empty_like(side) for side in pairs]
        for m in range(mmax + 1):
            total, *signs = grads[3 * m - 2 : 3 * m + 1] if m else grads[:1]
            grad = torch.stack([total + sign for sign in signs] if m else [total], dim=1)
            grad = grad.unflatten(2, (-1, 2 * channels))
            # The gradient of the radial weights is added: orders may share them.
            scale, grad_scale = (radial_of(t, 2 * channels, lmax, m, shared) for t in (radial, grad_radial))
            halves = slice(channels), slice(channels, None)
            for side, grad_side, columns in zip(pairs, grad_pairs, halves, strict=True):
                torch.mul(grad[..., columns], scale[..., columns], out=order_of(grad_side, lmax, m))
                product = grad[..., columns] * order_of(side, lmax, m)
                grad_scale[..., columns] += product.sum(1, keepdim=True)
        back = matrices.transpose(1, 2)
        add_rows_(grad_x, self.source, torch.bmm(back, grad_pairs[0]).to(grad_x.dtype))
        add_rows_(grad_x_target, self.target, torch.bmm(back, grad_pairs[1]).to(grad_x.dtype))
        return grad_radial

    @property
    def _geometry(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.x_target, self.source, self.target, self.packed

    def _rotated_pairs(self, degrees: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        """Rotate the features of sources and targets into the edge frames; also give the matrices."""
        matrices = rotation_matrices(self.packed, degrees)
        sides = (self.x, self.source), (self.x_target, self.target)
        return [torch.bmm(matrices, take_rows(features, index)) for features, index in sides], matrices


def order_of(rotated: Tensor, lmax: int, m: int) -> Tensor:
    """View the rows of order m of an m-major tensor `[E, R, C]` as `[E, 1 or 2, L+1-m, C]`."""
    components, degrees, start = 1 if m == 0 else 2, lmax + 1 - m, OrderLayout.first_row(m, lmax)
    return rotated[:, start : start + components * degrees].unflatten(1, (components, degrees))


def radial_of(radial: Tensor, width: int, lmax: int, m: int, shared_orders: bool) -> Tensor:
    """View the radial weights of order m, of groups of `width`, as `[E, 1, L+1-m, width]`."""
    first, degrees = OrderLayout.radial_row(m, m, lmax, shared_orders), lmax + 1 - m
    return radial[:, first * width : (first + degrees) * width].unflatten(1, (1, degrees, width))


class _ConvolveEdges(torch.autograd.Function):
    """Chunk by chunk; the backward pass rotates and weights the features of a chunk once more."""

    @staticmethod
    def forward(ctx, extra, options, *tensors):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*tensors)
        ctx.extra, ctx.options = extra, options
        return _ConvolveEdges.stream(Edges(*tensors[:8]), SO2Weights.from_flat(tensors[8:]), extra, options)

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
        edges = edges.prepared(options)
        grad_hidden = torch.empty_like(edges.hidden)
        # Weight gradients are sums over all edges: collected in float32 also when the GEMMs run in bf16.
        sums = edges.radial_weight, edges.radial_bias, *terms
        grad_radial_weight, grad_radial_bias, *grad_terms = (
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in sums
        )
        grad_bias = torch.cat([grad_scalars.sum(0), grad_out[:, : len(weights.bias) - ctx.extra].sum(0)])
        for part in edges.chunks(options):
            some = edges.part(part)
            radial = linear(some.hidden, edges.radial_weight)
            inputs = some.inputs(options, radial)
            grads = _ConvolveEdges.product_gradients(grad_scalars[part], grad_out[part], terms)
            grads = products_backward(inputs, grads, terms, grad_terms)
            del inputs
            grad_radial = some.inputs_backward(radial, grads, grad_x, grad_x_target, options)
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

    @staticmethod
    def product_gradients(grad_scalars: Tensor, grad_out: Tensor, terms: list[Tensor]) -> list[Tensor]:
        """Compute the gradients of the products of all GEMMs from those of the outputs of some edges."""
        dtype, first = terms[0].dtype, len(terms[0]) - grad_scalars.shape[1]
        of_scalars = torch.cat((grad_scalars, grad_out[:, :first]), dim=1).to(dtype)
        return [of_scalars, *gauss_gradients(grad_out[:, first:].to(dtype), [len(t) for t in terms[1:]])]

    @staticmethod
    def stream(edges: Edges, weights: SO2Weights, extra: int, options: InputOptions) -> tuple[Tensor, Tensor]:
        """Compute `convolve_edges` chunk by chunk, without derivatives."""
        edges = edges.prepared(options)
        terms = weights.terms(edges.hidden.dtype)
        bias, first = weights.bias.to(edges.hidden.dtype), len(weights.scalar) - extra
        scalars = edges.hidden.new_empty(len(edges.source), extra)
        out = edges.hidden.new_empty(len(edges.source), first + sum(len(weight) for weight in weights.orders))
        for part in edges.chunks(options):
            inputs = edges.part(part).inputs(options)
            result, *others = (linear(x, term) for x, term in zip(inputs, terms, strict=True))
            torch.add(result[:, :extra], bias[:extra], out=scalars[part])
            gauss_values([result[:, extra:], *others], bias[extra:], out[part])
        return scalars, out

    @staticmethod
    def expression(
        edges: Edges, weights: SO2Weights, extra: int, lmax: int, shared: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute `convolve_edges` under ordinary autograd."""
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

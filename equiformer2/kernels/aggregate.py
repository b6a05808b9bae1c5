"""Second half of a message: nonlinearity, SO(2) GEMMs, attention weights, rotation back, sum over edges."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equiformer2.kernels import triton_path
from equiformer2.kernels.backend import Backend, Neighbors
from equiformer2.kernels.chunks import chunks, no_autocast
from equiformer2.kernels.edge_sums import (
    Messages,
    SummedMessages,
    SumOptions,
    add_messages,
    messages_backward,
)
from equiformer2.kernels.linear import linear
from equiformer2.kernels.rotation import rotation_matrices
from equiformer2.kernels.rows import sum_rows
from equiformer2.kernels.so2 import (
    SO2Weights,
    gauss_inputs,
    gauss_values,
    gemm_dtype,
    products_backward,
    so2_linear,
)

#: From the hidden features of some edges to m-major inputs `[e, R, C]` of the second convolution.
Activation = Callable[[Tensor], Tensor]


def attend(
    hidden: Tensor,
    alpha: Tensor,
    packed: Tensor,
    target: Tensor,
    num_targets: int,
    activation: Activation,
    weights: SO2Weights,
    degrees: tuple[int, int],
    kept: tuple[int, int],
    backend: Backend,
    neighbors: Neighbors | None = None,
) -> Tensor:
    """Sum over incoming edges of attention weight times second convolution of the activated hidden features.

    Nothing of the size of the edges is stored but the arguments and, for the derivatives, the values
    (`[E, R, channels]`, m-major).

    Args:
        hidden: `[E, W]` what the first convolution gave.
        alpha: `[E, H]` attention weights, each for consecutive channels.
        packed: Wigner-D entries of the edges (see `kernels.rotation`).
        target: `[E]` sorted target atoms.
        num_targets: N.
        activation: nonlinearity without parameters.
        weights: of the second convolution.
        degrees: highest degree and order of `packed`.
        kept: highest degree and order that the second convolution gives.
        backend: the implementation; that of `activation`, too.
        neighbors: of the edges, for the backend `triton`, which runs where they are given.

    Returns:
        `[N, (kept degree + 1)^2, channels]` in float32 or wider. Deterministic: edges are added in order.
    """
    dtype = gemm_dtype(hidden, weights)
    outputs = len(weights.bias) // (kept[0] + 1)
    rows = sum(2 * min(l, kept[1]) + 1 for l in range(kept[0] + 1))
    # hidden features, their activation, values twice, messages
    bytes_per_edge = 4 * (2 * hidden.shape[1] + outputs * (2 * rows + (kept[0] + 1) ** 2))
    with no_autocast(hidden):
        if neighbors is not None:
            edges = hidden, alpha, packed, target
            return triton_path.attend(*edges, activation, weights, dtype, degrees, kept, neighbors)
        if backend.takes_expressions(packed.requires_grad):
            values = so2_linear(activation(hidden).to(dtype), weights.terms(dtype), weights.bias, degrees[0])
            by_head = values.unflatten(1, (rows, alpha.shape[1], outputs // alpha.shape[1]))
            weighted = (by_head * alpha.to(dtype)[:, None, :, None]).flatten(2)
            return sum_rows(
                at_least_float32(_rotate_back(weighted, packed, degrees, kept)), target, num_targets
            )
        options = SumOptions(degrees, kept, backend.takes_cpp(dtype))
        plan = _Plan(dtype, activation, num_targets, bytes_per_edge, options)
        if not torch.is_grad_enabled():
            return _streamed(plan, hidden, alpha, packed, target, weights)
        return _Attend.apply(plan, hidden, alpha, packed, target, *weights.flat)


def sum_rotated(
    values: Tensor,
    packed: Tensor,
    target: Tensor,
    num_targets: int,
    degrees: tuple[int, int],
    backend: Backend,
    neighbors: Neighbors | None = None,
) -> Tensor:
    """Sum over incoming edges of coefficients of order m = 0, rotated back to the global frame.

    Args:
        values: `[E, L+1, C]` in the edge frames.
        packed, target, num_targets, degrees, backend, neighbors: as in `attend`.

    Returns:
        `[N, K, C]` in float32 or wider.
    """

    kept = degrees[0], 0
    with no_autocast(values):
        if neighbors is not None:
            return triton_path.sum_rotated(values, None, packed, target, degrees, kept, neighbors)
        if backend.takes_expressions(packed.requires_grad):
            rows = _rotate_back(at_least_float32(values), packed, degrees, kept)
            return sum_rows(rows, target, num_targets)
        options = SumOptions(degrees, kept, backend.takes_cpp(at_least_float32(values[:0]).dtype))
        return _SumRotated.apply(values, packed, target, num_targets, options)


def at_least_float32(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotate_back(x: Tensor, packed: Tensor, degrees: tuple[int, int], kept: tuple[int, int]) -> Tensor:
    """m-major `[e, R, C]` to the global frame, `[e, K, C]`."""
    return torch.bmm(rotation_matrices(packed, degrees, kept).transpose(1, 2).to(x.dtype), x)


class _SumRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, packed, target, num_targets, options):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(packed, target)
        ctx.options, ctx.dtype = options, values.dtype
        values, packed = at_least_float32(values).contiguous(), packed.contiguous()
        shape = (num_targets, (options.kept[0] + 1) ** 2, values.shape[2])
        total = values.new_zeros(shape)
        for part in chunks(len(target), 4 * shape[1] * shape[2], values.device):
            products = [values[part].flatten(1)]
            add_messages(Messages(products, None, None, packed[part], target[part]), total, options)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        (packed, target), options = ctx.saved_tensors, ctx.options
        packed, grad_total = packed.contiguous(), grad_total.contiguous()
        channels = grad_total.shape[2]
        grad = grad_total.new_empty(len(target), options.kept[0] + 1, channels, dtype=ctx.dtype)
        for part in chunks(len(target), 4 * grad_total[:1].numel(), grad.device):
            edges = SummedMessages(None, None, packed[part], target[part])
            (grad_values,), _ = messages_backward(edges, grad_total, options, grad_total.dtype)
            grad[part] = grad_values.unflatten(1, (-1, channels))
        return grad, None, None, None, None


class _Plan(NamedTuple):
    """What `attend` does, beside its tensors."""

    dtype: torch.dtype
    activation: Activation
    num_targets: int
    bytes_per_edge: int
    options: SumOptions

    def inputs(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Activated hidden features of some edges, and the GEMM inputs that they are."""
        activated = self.activation(hidden).to(self.dtype)
        return activated, gauss_inputs(activated.detach(), self.options.degrees[0], self.options.kept[1])


def _streamed(plan, hidden, alpha, packed, target, weights, values=None):  # type: ignore[no-untyped-def]
    """Chunk by chunk, without derivatives; `values [E, R C]` are kept where there is a place for them."""
    terms, bias = weights.terms(plan.dtype), weights.bias.to(plan.dtype)
    packed, alpha = _prepared(plan, packed, alpha)
    rows = (plan.options.kept[0] + 1) ** 2
    total = packed.new_zeros(plan.num_targets, rows, len(bias) // (plan.options.kept[0] + 1))
    for part in chunks(len(target), plan.bytes_per_edge, hidden.device):
        _, inputs = plan.inputs(hidden[part])
        products = [linear(x, term) for x, term in zip(inputs, terms, strict=True)]
        messages = Messages(products, bias, alpha[part], packed[part], target[part])
        add_messages(messages, total, plan.options)
        if values is not None:
            gauss_values(products, bias, values[part])
    return total


def _prepared(plan, packed, alpha):  # type: ignore[no-untyped-def]
    """Contiguous and in the precision of the sums, float32 or wider."""
    dtype = torch.promote_types(plan.dtype, torch.float32)
    return packed.to(dtype).contiguous(), alpha.to(dtype).contiguous()


class _Attend(torch.autograd.Function):
    """Chunk by chunk; the backward pass activates the hidden features of a chunk once more.

    The values of the edges are kept: they are smaller than what comes before them, and the GEMMs that make
    them take longer than reading them.
    """

    @staticmethod
    def forward(ctx, plan, hidden, alpha, packed, target, *flat):  # type: ignore[no-untyped-def]
        weights = SO2Weights.from_flat(flat)
        columns = len(weights.bias) + sum(len(weight) for weight in weights.orders)
        values = hidden.new_empty(len(target), columns, dtype=plan.dtype)
        ctx.save_for_backward(hidden, alpha, packed, target, values, *flat)
        ctx.plan = plan
        return _streamed(plan, hidden, alpha, packed, target, weights, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        hidden, alpha, packed, target, values, *flat = ctx.saved_tensors
        plan: _Plan = ctx.plan
        weights, grad_total = SO2Weights.from_flat(flat), grad_total.contiguous()
        terms = weights.terms(plan.dtype)
        packed, factors = _prepared(plan, packed, alpha)
        grad_hidden, grad_alpha = torch.empty_like(hidden), torch.empty_like(alpha)
        # Sums over all edges: collected in float32 also when the GEMMs run in bf16.
        grad_terms, grad_bias = (
            [torch.zeros_like(at_least_float32(term)) for term in terms],
            at_least_float32(weights.bias) * 0,
        )
        for part in chunks(len(target), plan.bytes_per_edge, hidden.device):
            some = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                activated, inputs = plan.inputs(some)
            summed = SummedMessages(values[part], factors[part], packed[part], target[part])
            grads, of_alpha = messages_backward(summed, grad_total, plan.options, plan.dtype)
            assert of_alpha is not None
            grad_alpha[part] = of_alpha
            grad_bias += grads[0].sum(0)
            grads = products_backward(inputs, grads, terms, grad_terms)
            grad_activated = _activation_gradient(grads, activated)
            (grad_hidden[part],) = torch.autograd.grad(activated, some, grad_activated)
        scalar, *orders = SO2Weights.gradients(grad_terms)
        return (
            None,
            grad_hidden,
            grad_alpha,
            *(None, None),
            *(g.to(w.dtype) for g, w in zip((scalar, grad_bias, *orders), flat, strict=True)),
        )


def _activation_gradient(grads: list[Tensor], activated: Tensor) -> Tensor:
    """Gradient of m-major `[e, R, C]` from those of the GEMM inputs; rows that no GEMM reads get zero."""
    out = activated.new_empty(activated.shape)
    columns = out.flatten(1)
    start = grads[0].shape[1]
    columns[:, :start] = grads[0]
    for total, *signs in zip(grads[1::3], grads[2::3], grads[3::3], strict=True):
        for grad in signs:
            torch.add(total, grad, out=columns[:, start : start + grad.shape[1]])
            start += grad.shape[1]
    columns[:, start:] = 0
    return out

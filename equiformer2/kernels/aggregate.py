"""Second half of a message: nonlinearity, SO(2) GEMMs, attention weights, rotation back, sum over edges."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equiformer2.kernels import triton_path
from equiformer2.kernels.backend import Backend, Neighbors
from equiformer2.kernels.chunks import chunks, no_autocast, take_rows
from equiformer2.kernels.cpu import edges as cpu
from equiformer2.kernels.cpu.ctypes_call import widths_per_order
from equiformer2.kernels.layout import OrderLayout
from equiformer2.kernels.linear import linear
from equiformer2.kernels.rotation import rotation_matrices
from equiformer2.kernels.rows import add_rows_, sum_rows
from equiformer2.kernels.so2 import (
    SO2Weights,
    gauss_gradients,
    gauss_inputs,
    gauss_values,
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
        hidden: `[E, W]` output of the first convolution.
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
    dtype = weights.gemm_dtype(hidden)
    outputs = len(weights.bias) // (kept[0] + 1)
    rows = OrderLayout(*kept).num_rows
    # hidden features, their activation, values twice, messages
    bytes_per_edge = 4 * (2 * hidden.shape[1] + outputs * (2 * rows + (kept[0] + 1) ** 2))
    with no_autocast(hidden):
        if neighbors is not None:
            edges = hidden, alpha, packed, target
            return triton_path.attend(*edges, activation, weights, dtype, degrees, kept, neighbors)
        if backend.takes_expressions(packed.requires_grad):
            values = so2_linear(activation(hidden).to(dtype), weights.terms(dtype), weights.bias, degrees[0])
            weighted = _weighted(values.unflatten(1, (rows, -1)), alpha)
            messages = _rotate_back(weighted, packed, degrees, kept)
            return sum_rows(at_least_float32(messages), target, num_targets)
        options = SumOptions(degrees, kept, backend.takes_cpp(dtype))
        plan = _Plan(dtype, activation, num_targets, bytes_per_edge, options)
        if not torch.is_grad_enabled():
            return plan.stream(hidden, alpha, packed, target, weights)
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
    """Cast `x` to float32, unless it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotate_back(x: Tensor, packed: Tensor, degrees: tuple[int, int], kept: tuple[int, int]) -> Tensor:
    """Rotate m-major `x [e, R, C]` to the global frame, `[e, K, C]`."""
    return torch.bmm(rotation_matrices(packed, degrees, kept).transpose(1, 2).to(x.dtype), x)


class SumOptions(NamedTuple):
    """Options of the sum of messages.

    Attributes:
        degrees: highest degree and order of the Wigner-D entries.
        kept: those of the values.
        cpp: use the C++ kernels.
    """

    degrees: tuple[int, int]
    kept: tuple[int, int]
    cpp: bool


class Messages(NamedTuple):
    """Some edges and their values.

    Attributes:
        products: GEMM outputs of every order (see `so2.gauss_triple`).
        bias: `[out_0]` of order m = 0, or None.
        alpha: `[e, H]` attention weights, each for consecutive channels, or None.
        packed: `[e, P + 1]` Wigner-D entries.
        target: `[e]` sorted target atoms.
    """

    products: list[Tensor]
    bias: Tensor | None
    alpha: Tensor | None
    packed: Tensor
    target: Tensor

    def add_to(self, out: Tensor, options: SumOptions) -> None:
        """Add attention weight times value, rotated to the global frame, to `out [N, (kept l + 1)^2, C]`."""
        degrees, kept, cpp = options
        if cpp:
            cpu.rotate_sum(*self, out, degrees, kept)
            return
        values = gauss_values(self.products, self.bias).unflatten(1, (-1, out.shape[2]))
        if self.alpha is not None:
            values = _weighted(values, self.alpha)
        matrices = rotation_matrices(self.packed, degrees, kept).to(values.dtype)
        add_rows_(out, self.target, torch.bmm(matrices.transpose(1, 2), values).to(out.dtype))


class SummedMessages(NamedTuple):
    """Some edges after their messages have been added.

    Attributes:
        values: `[e, R C]`, `so2.gauss_values` of the products; None without attention weights.
        alpha, packed, target: as in `Messages`.
    """

    values: Tensor | None
    alpha: Tensor | None
    packed: Tensor
    target: Tensor

    def gradients(
        self, grad_out: Tensor, options: SumOptions, dtype: torch.dtype
    ) -> tuple[list[Tensor], Tensor | None]:
        """Compute the gradients of the products, in `dtype`, and of the attention weights.

        Args:
            grad_out: gradient of the sums, `[N, (kept l + 1)^2, C]`.
            options: those of the sums.
            dtype: precision of the GEMMs.
        """
        degrees, kept, cpp = options
        if cpp:
            return cpu.rotate_sum_backward(grad_out, *self, degrees, kept, dtype)
        matrices = rotation_matrices(self.packed, degrees, kept).to(grad_out.dtype)
        grad, grad_alpha = torch.bmm(matrices, take_rows(grad_out, self.target)), None
        if self.alpha is not None:
            assert self.values is not None
            product = self.values.view(grad.shape).to(grad.dtype) * grad
            grad_alpha = product.unflatten(2, (self.alpha.shape[1], -1)).sum((1, 3))
            grad = _weighted(grad, self.alpha)
        flat, (first, *widths) = grad.to(dtype).flatten(1), widths_per_order(kept, grad.shape[2])
        return [flat[:, :first], *gauss_gradients(flat[:, first:], widths)], grad_alpha


def _weighted(values: Tensor, alpha: Tensor) -> Tensor:
    """Multiply `values [e, R, C]` by attention weights `alpha [e, H]`, each for consecutive channels."""
    by_head = values.unflatten(2, (alpha.shape[1], -1))
    return (by_head * alpha.to(values.dtype)[:, None, :, None]).flatten(2)


class _SumRotated(torch.autograd.Function):
    """Chunk by chunk; nothing of the size of the edges is kept but the arguments."""

    @staticmethod
    def forward(ctx, values, packed, target, num_targets, options):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(packed, target)
        ctx.options, ctx.dtype = options, values.dtype
        values, packed = at_least_float32(values).contiguous(), packed.contiguous()
        shape = (num_targets, (options.kept[0] + 1) ** 2, values.shape[2])
        total = values.new_zeros(shape)
        for part in chunks(len(target), 4 * shape[1] * shape[2], values.device):
            products = [values[part].flatten(1)]
            Messages(products, None, None, packed[part], target[part]).add_to(total, options)
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
            (grad_values,), _ = edges.gradients(grad_total, options, grad_total.dtype)
            grad[part] = grad_values.unflatten(1, (-1, channels))
        return grad, None, None, None, None


class _Plan(NamedTuple):
    """Arguments of `attend` that are no tensors, and the loop over chunks of edges."""

    dtype: torch.dtype
    activation: Activation
    num_targets: int
    bytes_per_edge: int
    options: SumOptions

    def inputs(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Activated hidden features of some edges, and the GEMM inputs that they are."""
        activated = self.activation(hidden).to(self.dtype)
        return activated, gauss_inputs(activated.detach(), self.options.degrees[0], self.options.kept[1])

    def prepared(self, packed: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Make both contiguous, in the precision of the sums: float32 or wider."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return packed.to(dtype).contiguous(), alpha.to(dtype).contiguous()

    def stream(
        self,
        hidden: Tensor,
        alpha: Tensor,
        packed: Tensor,
        target: Tensor,
        weights: SO2Weights,
        values: Tensor | None = None,
    ) -> Tensor:
        """Compute `attend` without derivatives; the values of the edges are written to `values [E, R C]`."""
        terms, bias = weights.terms(self.dtype), weights.bias.to(self.dtype)
        packed, alpha = self.prepared(packed, alpha)
        rows = (self.options.kept[0] + 1) ** 2
        total = packed.new_zeros(self.num_targets, rows, len(bias) // (self.options.kept[0] + 1))
        for part in chunks(len(target), self.bytes_per_edge, hidden.device):
            _, inputs = self.inputs(hidden[part])
            products = [linear(x, term) for x, term in zip(inputs, terms, strict=True)]
            Messages(products, bias, alpha[part], packed[part], target[part]).add_to(total, self.options)
            if values is not None:
                gauss_values(products, bias, values[part])
        return total

    @staticmethod
    def activation_gradient(grads: list[Tensor], activated: Tensor) -> Tensor:
        """Compute the gradient of m-major `[e, R, C]` from those of the GEMM inputs.

        Rows that no GEMM reads get zero.
        """
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
        return plan.stream(hidden, alpha, packed, target, weights, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        hidden, alpha, packed, target, values, *flat = ctx.saved_tensors
        plan: _Plan = ctx.plan
        weights, grad_total = SO2Weights.from_flat(flat), grad_total.contiguous()
        terms = weights.terms(plan.dtype)
        packed, factors = plan.prepared(packed, alpha)
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
            grads, of_alpha = summed.gradients(grad_total, plan.options, plan.dtype)
            assert of_alpha is not None
            grad_alpha[part] = of_alpha
            grad_bias += grads[0].sum(0)
            grads = products_backward(inputs, grads, terms, grad_terms)
            grad_activated = plan.activation_gradient(grads, activated)
            (grad_hidden[part],) = torch.autograd.grad(activated, some, grad_activated)
        scalar, *orders = SO2Weights.gradients(grad_terms)
        return (
            None,
            grad_hidden,
            grad_alpha,
            *(None, None),
            *(g.to(w.dtype) for g, w in zip((scalar, grad_bias, *orders), flat, strict=True)),
        )

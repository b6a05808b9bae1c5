"""Second half of a message: nonlinearity, SO(2) GEMMs, attention weights, rotation back, sum over edges."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equiformer2.kernels import triton_path
from equiformer2.kernels.backend import plain_expressions, triton_neighbors
from equiformer2.kernels.chunks import chunks, no_autocast, take_rows
from equiformer2.kernels.rotation import rotation_matrices
from equiformer2.kernels.rows import sum_rows
from equiformer2.kernels.so2 import SO2Weights, gemm_dtype, so2_linear

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
) -> Tensor:
    """Sum over incoming edges of attention weight times second convolution of the activated hidden features.

    Nothing of the size of the edges is stored but the arguments.

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

    Returns:
        `[N, (kept degree + 1)^2, channels]` in float32 or wider. Deterministic: edges are added in order.
    """
    dtype = gemm_dtype(hidden, weights)
    outputs = len(weights.bias) // (kept[0] + 1)
    heads, rows = alpha.shape[1], sum(2 * min(l, kept[1]) + 1 for l in range(kept[0] + 1))

    def messages(hidden: Tensor, alpha: Tensor, packed: Tensor, bias: Tensor, *terms: Tensor) -> Tensor:
        values = so2_linear(activation(hidden).to(dtype), terms, bias, degrees[0])
        by_head = values.view(len(values), rows, heads, outputs // heads)
        weighted = (by_head * alpha.to(dtype)[:, None, :, None]).flatten(2)
        return widened(_rotate_back(weighted, packed, degrees, kept))

    # hidden features, their activation, values twice, messages
    bytes_per_edge = 4 * (2 * hidden.shape[1] + outputs * (2 * rows + (kept[0] + 1) ** 2))
    arguments = (messages, dtype, hidden, alpha, packed, target, num_targets, bytes_per_edge)
    neighbors = triton_neighbors()
    with no_autocast(hidden):
        if neighbors is not None:
            edges = hidden, alpha, packed, target
            return triton_path.attend(*edges, activation, weights, dtype, degrees, kept, neighbors)
        if plain_expressions(packed.requires_grad):
            out = messages(hidden, alpha, packed, weights.bias, *weights.terms(dtype))
            return sum_rows(out, target, num_targets)
        if not torch.is_grad_enabled():
            return _streamed(*arguments, weights)
        return _Attend.apply(*arguments, *weights.flat)


def sum_rotated(
    values: Tensor, packed: Tensor, target: Tensor, num_targets: int, degrees: tuple[int, int]
) -> Tensor:
    """Sum over incoming edges of coefficients of order m = 0, rotated back to the global frame.

    Args:
        values: `[E, L+1, C]` in the edge frames.
        packed, target, num_targets, degrees: as in `attend`.

    Returns:
        `[N, K, C]` in float32 or wider.
    """

    kept = degrees[0], 0
    neighbors = triton_neighbors()
    with no_autocast(values):
        if neighbors is not None:
            return triton_path.sum_rotated(values, None, packed, target, degrees, kept, neighbors)
        if plain_expressions(packed.requires_grad):
            rows = _rotate_back(widened(values), packed, degrees, kept)
            return sum_rows(rows, target, num_targets)
        return _SumRotated.apply(values, packed, target, num_targets, degrees, kept)


def widened(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotate_back(x: Tensor, packed: Tensor, degrees: tuple[int, int], kept: tuple[int, int]) -> Tensor:
    """m-major `[e, R, C]` to the global frame, `[e, K, C]`."""
    return torch.bmm(rotation_matrices(packed, degrees, kept).transpose(1, 2).to(x.dtype), x)


class _SumRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, packed, target, num_targets, degrees, kept):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(packed, target)
        ctx.degrees, ctx.kept, ctx.dtype = degrees, kept, values.dtype
        shape = (num_targets, (kept[0] + 1) ** 2, values.shape[2])
        total = widened(values[:0]).new_zeros(shape)
        for part in chunks(len(target), 4 * shape[1] * shape[2], values.device):
            rows = _rotate_back(widened(values[part]), packed[part], degrees, kept)
            total.index_add_(0, target[part], rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        packed, target = ctx.saved_tensors
        grad = grad_total.new_empty(len(target), ctx.kept[0] + 1, grad_total.shape[2], dtype=ctx.dtype)
        for part in chunks(len(target), 4 * grad_total[:1].numel(), grad.device):
            matrices = rotation_matrices(packed[part], ctx.degrees, ctx.kept).to(grad_total.dtype)
            grad[part] = torch.bmm(matrices, take_rows(grad_total, target[part]))
        return grad, None, None, None, None, None


def _streamed(messages, dtype, hidden, alpha, packed, target, num_targets, bytes_per_edge, weights):  # type: ignore[no-untyped-def]
    """Chunk by chunk, without derivatives."""
    terms = weights.terms(dtype)
    total = None
    # At least one pass, for the shape.
    for part in list(chunks(len(target), bytes_per_edge, hidden.device)) or [slice(0, 0)]:
        rows = messages(hidden[part], alpha[part], packed[part], weights.bias, *terms)
        if total is None:
            total = rows.new_zeros(num_targets, *rows.shape[1:])
        total.index_add_(0, target[part], rows)
    return total


class _Attend(torch.autograd.Function):
    """Chunk by chunk; the backward pass computes the messages of a chunk once more."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, messages, dtype, hidden, alpha, packed, target, num_targets, bytes_per_edge, *flat
    ):
        ctx.save_for_backward(hidden, alpha, packed, target, *flat)
        ctx.messages, ctx.dtype, ctx.bytes_per_edge = messages, dtype, bytes_per_edge
        weights = SO2Weights.from_flat(flat)
        return _streamed(messages, dtype, hidden, alpha, packed, target, num_targets, bytes_per_edge, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        hidden, alpha, packed, target, *flat = ctx.saved_tensors
        weights = SO2Weights.from_flat(flat)
        leaves = [t.detach().requires_grad_() for t in (weights.bias, *weights.terms(ctx.dtype))]
        grad_hidden, grad_alpha = torch.empty_like(hidden), torch.empty_like(alpha)
        # Sums over all edges: collected in float32 also when the GEMMs run in bf16.
        grad_leaves = [torch.zeros_like(widened(leaf)) for leaf in leaves]
        for part in chunks(len(target), 2 * ctx.bytes_per_edge, hidden.device):
            edges = [t[part].detach().requires_grad_() for t in (hidden, alpha)]
            with torch.enable_grad():
                out = ctx.messages(*edges, packed[part], *leaves)
            grads = torch.autograd.grad(out, [*edges, *leaves], take_rows(grad_total, target[part]))
            grad_hidden[part], grad_alpha[part] = grads[:2]
            for total, piece in zip(grad_leaves, grads[2:], strict=True):
                total += piece
        grad_bias, *grad_terms = grad_leaves
        scalar, *orders = SO2Weights.gradients(grad_terms)
        return (
            *(None, None),
            grad_hidden,
            grad_alpha,
            *(None, None, None, None),
            *(g.to(w.dtype) for g, w in zip((scalar, grad_bias, *orders), flat, strict=True)),
        )

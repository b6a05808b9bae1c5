"""Second half of a message: attention weights times values, rotate back, sum over incoming edges."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equiformer2.kernels.chunks import chunks, no_autocast
from equiformer2.kernels.rotation import rotate_from_edges, rotate_to_edges


def aggregate_messages(
    values: Tensor,
    alpha: Tensor | None,
    blocks: list[Tensor],
    target: Tensor,
    num_targets: int,
    scale: list[float],
) -> Tensor:
    """Sum over incoming edges of the values, weighted by attention and rotated back to the global frame.

    Args:
        values: `[E, R, C]` m-major coefficients in the edge frames, or `[E, S, C]` with only the first orders
            when every block has only the rows of these orders.
        alpha: `[E, H]` attention weights, each for C / H consecutive channels; None for plain sums.
        blocks: Wigner-D blocks `[E, rows, 2l+1]` of the edges for l = 0..L (see `kernels.rotation`).
        target: `[E]` sorted target atoms.
        num_targets: N.
        scale: factor of each degree.

    Returns:
        `[N, K, C]` in float32 or wider. Deterministic: edges are added in their sorted order.
    """
    with no_autocast(values):
        if not (torch.is_grad_enabled() and any(block.requires_grad for block in blocks)):
            return _AggregateMessages.apply(values, alpha, target, num_targets, scale, *blocks)
        messages = rotate_from_edges(_weighted(values, alpha), blocks, scale)
        total = messages.new_zeros(num_targets, messages.shape[1], messages.shape[2])
        return total.index_add(0, target, messages)


def _weighted(values: Tensor, alpha: Tensor | None) -> Tensor:
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if alpha is None:
        return values
    heads = alpha.shape[1]
    return (values.unflatten(2, (heads, -1)) * alpha[:, None, :, None]).flatten(2)


class _AggregateMessages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, alpha, target, num_targets, scale, *blocks):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, alpha, target, *blocks)
        ctx.scale = scale
        coefficients = sum(block.shape[2] for block in blocks)
        dtype = torch.promote_types(values.dtype, torch.float32)
        total = values.new_zeros(num_targets, coefficients, values.shape[2], dtype=dtype)
        for part in chunks(len(values), _bytes_per_edge(values, coefficients), values.device):
            weighted = _weighted(values[part], None if alpha is None else alpha[part])
            messages = rotate_from_edges(weighted, [block[part] for block in blocks], scale)
            total.index_add_(0, target[part], messages)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        values, alpha, target, *blocks = ctx.saved_tensors
        grad_values = torch.empty_like(values, memory_format=torch.contiguous_format)
        grad_alpha = None if alpha is None else torch.empty_like(alpha)
        scaled = torch.cat(
            [grad_total[:, l * l : (l + 1) ** 2] * factor for l, factor in enumerate(ctx.scale)], dim=1
        )
        for part in chunks(len(values), _bytes_per_edge(values, grad_total.shape[1]), values.device):
            grad = rotate_to_edges([scaled[target[part]]], [block[part] for block in blocks])
            if alpha is None or grad_alpha is None:
                grad_values[part] = grad
                continue
            by_head = grad.unflatten(2, (alpha.shape[1], -1))
            grad_values[part] = (by_head * alpha[part][:, None, :, None]).flatten(2)
            grad_alpha[part] = (by_head * values[part].unflatten(2, (alpha.shape[1], -1))).sum((1, 3))
        return grad_values, grad_alpha, None, None, None, *([None] * len(blocks))


def _bytes_per_edge(values: Tensor, coefficients: int) -> int:
    return 4 * values.shape[2] * (3 * coefficients + values.shape[1])

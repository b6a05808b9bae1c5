"""What stands behind the last GEMMs of a message: attention weights, rotation back, sum over edges."""

from typing import NamedTuple

import torch
from torch import Tensor

from equiformer2.kernels.chunks import take_rows
from equiformer2.kernels.cpu import edges as cpu
from equiformer2.kernels.cpu.ctypes_call import widths_per_order
from equiformer2.kernels.rotation import rotation_matrices
from equiformer2.kernels.rows import add_rows_
from equiformer2.kernels.so2 import gauss_gradients, gauss_values


class SumOptions(NamedTuple):
    """How messages are summed.

    Attributes:
        degrees: highest degree and order of the Wigner-D entries.
        kept: those of the values.
        cpp: whether the C++ kernels are used.
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


def add_messages(edges: Messages, out: Tensor, options: SumOptions) -> None:
    """Adds attention weight times value, rotated to the global frame, to `out [N, (kept l + 1)^2, C]`."""
    degrees, kept, cpp = options
    if cpp:
        cpu.rotate_sum(*edges, out, degrees, kept)
        return
    values = gauss_values(edges.products, edges.bias).unflatten(1, (-1, out.shape[2]))
    if edges.alpha is not None:
        values = _by_head(values, edges.alpha)
    matrices = rotation_matrices(edges.packed, degrees, kept).to(values.dtype)
    add_rows_(out, edges.target, torch.bmm(matrices.transpose(1, 2), values).to(out.dtype))


class SummedMessages(NamedTuple):
    """Some edges after their messages have been added.

    Attributes:
        values: `[e, R C]` what `so2.gauss_values` makes of the products; None without attention weights.
        alpha, packed, target: as in `Messages`.
    """

    values: Tensor | None
    alpha: Tensor | None
    packed: Tensor
    target: Tensor


def messages_backward(
    edges: SummedMessages, grad_out: Tensor, options: SumOptions, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the products, in `dtype`, and of the attention weights."""
    degrees, kept, cpp = options
    if cpp:
        return cpu.rotate_sum_backward(grad_out, *edges, degrees, kept, dtype)
    matrices = rotation_matrices(edges.packed, degrees, kept).to(grad_out.dtype)
    grad, grad_alpha = torch.bmm(matrices, take_rows(grad_out, edges.target)), None
    if edges.alpha is not None:
        assert edges.values is not None
        product = edges.values.view(grad.shape).to(grad.dtype) * grad
        grad_alpha = product.unflatten(2, (edges.alpha.shape[1], -1)).sum((1, 3))
        grad = _by_head(grad, edges.alpha)
    flat, (first, *widths) = grad.to(dtype).flatten(1), widths_per_order(kept, grad.shape[2])
    return [flat[:, :first], *gauss_gradients(flat[:, first:], widths)], grad_alpha


def _by_head(values: Tensor, alpha: Tensor) -> Tensor:
    by_head = values.unflatten(2, (alpha.shape[1], -1))
    return (by_head * alpha.to(values.dtype)[:, None, :, None]).flatten(2)

"""Calls of the C++ kernels for edges."""

import ctypes

import torch
from torch import Tensor

from equiformer2.kernels.cpu.library import function


def gather_rotate(
    x: Tensor,
    x_target: Tensor,
    source: Tensor,
    target: Tensor,
    packed: Tensor,
    radial: Tensor,
    bias: Tensor,
    degrees: tuple[int, int],
    shared: bool,
) -> list[Tensor]:
    """GEMM inputs of every order: `kernels.edge_inputs.edge_inputs`, with `radial` before its bias."""
    out = empty_per_order(radial, degrees, 2 * x.shape[2])
    arguments = (x, x_target, source, target, packed, packed.shape[1], radial, bias, radial.shape[1])
    call("gather_rotate", radial.dtype, *arguments, out, len(source), x.shape[2], *degrees, shared)
    return out


def gather_rotate_backward(
    x: Tensor,
    x_target: Tensor,
    source: Tensor,
    target: Tensor,
    packed: Tensor,
    radial: Tensor,
    bias: Tensor,
    grads: list[Tensor],
    grad_x: Tensor,
    grad_x_target: Tensor,
    degrees: tuple[int, int],
    shared: bool,
) -> Tensor:
    """Adds to the gradients of the features; returns that of the radial weights."""
    grad_radial = torch.empty_like(radial)
    arguments = (x, x_target, source, target, packed, packed.shape[1], radial, bias, radial.shape[1])
    totals = grad_x, grad_x_target, grad_radial
    sizes = len(source), x.shape[2], *degrees
    call("gather_rotate_backward", radial.dtype, *arguments, grads, *totals, *sizes, shared)
    return grad_radial


def rotate_sum(
    values: list[Tensor],
    bias: Tensor | None,
    alpha: Tensor | None,
    packed: Tensor,
    target: Tensor,
    out: Tensor,
    degrees: tuple[int, int],
    kept: tuple[int, int],
) -> None:
    """Adds the messages of some edges to `out`: `kernels.edge_sums.add_messages`."""
    heads = 1 if alpha is None else alpha.shape[1]
    sizes = len(target), out.shape[2], *degrees, *kept
    arguments = (values, bias, alpha, heads, packed, packed.shape[1], target, out)
    call("rotate_sum", values[0].dtype, *arguments, *sizes)


def rotate_sum_backward(
    grad: Tensor,
    values: list[Tensor] | None,
    bias: Tensor | None,
    alpha: Tensor | None,
    packed: Tensor,
    target: Tensor,
    degrees: tuple[int, int],
    kept: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the products and of the attention weights: `kernels.edge_sums.messages_backward`."""
    grads = empty_per_order(grad.new_empty(len(target), 0, dtype=dtype), kept, grad.shape[2])
    grad_alpha = None if alpha is None else torch.empty_like(alpha)
    heads = 1 if alpha is None else alpha.shape[1]
    arguments = (grad, values, bias, alpha, heads, packed, packed.shape[1], target, grads, grad_alpha)
    call("rotate_sum_backward", dtype, *arguments, len(target), grad.shape[2], *degrees, *kept)
    return grads, grad_alpha


def empty_per_order(like: Tensor, degrees: tuple[int, int], channels: int) -> list[Tensor]:
    """Operands `[e, (L+1-m) channels]` of the GEMMs, one for m = 0 and three else; e rows as in `like`."""
    lmax, mmax = degrees
    orders = [0, *(m for m in range(1, mmax + 1) for _ in range(3))]
    return [like.new_empty(len(like), (lmax + 1 - m) * channels) for m in orders]


def call(name: str, dtype: torch.dtype, *arguments: Tensor | list[Tensor] | int | None) -> None:
    """Kernel `name` for GEMM operands of `dtype`, on torch's number of threads."""
    function(name, dtype)(*map(_argument, arguments), _argument(torch.get_num_threads()))


def _argument(value: Tensor | list[Tensor] | int | None) -> object:
    if isinstance(value, Tensor):
        assert value[:1].is_contiguous(), value.stride()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, list):
        return (ctypes.c_void_p * len(value))(*(tensor.data_ptr() for tensor in value))
    return None if value is None else ctypes.c_int64(value)

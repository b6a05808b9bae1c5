"""Calls of the compiled kernels: tensors become addresses, so what they are is checked first."""

import ctypes

import torch
from torch import Tensor

from equiformer2.kernels.cpu.library import LIBRARIES


def check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raise unless a kernel can read and write `tensor` by its address.

    Raises:
        ValueError: it is not a contiguous tensor of `dtype` and `shape` on the CPU; `name` is named.
    """
    of = tensor.device.type, tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()
    if of != ("cpu", dtype, shape, True):
        layout = "contiguous" if of[3] else f"with the strides {tensor.stride()}"
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor of shape {shape} on the CPU, "
            f"not {tensor.dtype} {of[2]} on {of[0]}, {layout}"
        )


def check_per_order(
    name: str, tensors: list[Tensor], dtype: torch.dtype, edges: int, degrees: tuple[int, int], channels: int
) -> None:
    """`check` of the operands of all GEMMs, as `empty_per_order` makes them."""
    widths = widths_per_order(degrees, channels)
    if len(tensors) != len(widths):
        raise ValueError(f"{name} must be {len(widths)} tensors, not {len(tensors)}")
    for tensor, width in zip(tensors, widths, strict=True):
        check(name, tensor, dtype, edges, width)


def empty_per_order(like: Tensor, degrees: tuple[int, int], channels: int) -> list[Tensor]:
    """Operands `[e, (L+1-m) channels]` of the GEMMs, one for m = 0 and three else; e rows as in `like`."""
    return [like.new_empty(len(like), width) for width in widths_per_order(degrees, channels)]


def widths_per_order(degrees: tuple[int, int], channels: int) -> list[int]:
    """Columns of the operands of all GEMMs."""
    lmax, mmax = degrees
    orders = [0, *(m for m in range(1, mmax + 1) for _ in range(3))]
    return [(lmax + 1 - m) * channels for m in orders]


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in, for GEMM operands of `dtype`: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def call(name: str, dtype: torch.dtype, order: int, *arguments: Tensor | list[Tensor] | int | None) -> None:
    """Run a kernel on torch's number of threads.

    Args:
        name: of the kernel.
        dtype: type of the operands of the GEMMs.
        order: highest order m that the arguments ask for.
        arguments: what the kernel takes, without the number of threads.
    """
    kernel = LIBRARIES.function(name, dtype, order)
    kernel(*map(_argument, arguments), _argument(torch.get_num_threads()))


def _argument(value: Tensor | list[Tensor] | int | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, list):
        return (ctypes.c_void_p * len(value))(*(tensor.data_ptr() for tensor in value))
    return None if value is None else ctypes.c_int64(value)

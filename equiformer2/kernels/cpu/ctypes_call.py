"""Calls of the compiled kernels: tensors become addresses, so their type and shape are checked first."""

import ctypes

import torch
from torch import Tensor

from equiformer2.kernels.cpu.library import LIBRARIES


def check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Refuse a tensor that a kernel cannot read and write by its address.

    Args:
        name: name of the tensor, for the message.
        tensor: the tensor.
        dtype, shape: as the kernel needs them.

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
    """Refuse operands of the GEMMs that are not as `empty_per_order` makes them.

    Args:
        name: name of the operands, for the message.
        tensors: one for m = 0 and three for every other order.
        dtype: of the GEMMs.
        edges: rows of every tensor.
        degrees: highest degree and order.
        channels: channels of one degree.

    Raises:
        ValueError: their number, type, shape or layout differs.
    """
    widths = widths_per_order(degrees, channels)
    if len(tensors) != len(widths):
        raise ValueError(f"{name} must be {len(widths)} tensors, not {len(tensors)}")
    for tensor, width in zip(tensors, widths, strict=True):
        check(name, tensor, dtype, edges, width)


def empty_per_order(like: Tensor, degrees: tuple[int, int], channels: int) -> list[Tensor]:
    """Make operands `[e, (L+1-m) channels]` of the GEMMs, with the e rows of `like`; three per m > 0."""
    return [like.new_empty(len(like), width) for width in widths_per_order(degrees, channels)]


def widths_per_order(degrees: tuple[int, int], channels: int) -> list[int]:
    """Columns of the operands of all GEMMs: `(L+1-m) channels`, once for m = 0 and three times else."""
    lmax, mmax = degrees
    orders = [0, *(m for m in range(1, mmax + 1) for _ in range(3))]
    return [(lmax + 1 - m) * channels for m in orders]


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Precision in which a kernel computes, for GEMM operands of `dtype`: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def call(name: str, dtype: torch.dtype, order: int, *arguments: Tensor | list[Tensor] | int | None) -> None:
    """Run a kernel on torch's number of threads.

    Args:
        name: of the kernel.
        dtype: type of the operands of the GEMMs.
        order: highest order m that the arguments ask for.
        arguments: those of the kernel, without the number of threads.
    """

    def address(value: Tensor | list[Tensor] | int | None) -> object:
        if isinstance(value, Tensor):
            return ctypes.c_void_p(value.data_ptr())
        if isinstance(value, list):
            return (ctypes.c_void_p * len(value))(*(tensor.data_ptr() for tensor in value))
        return None if value is None else ctypes.c_int64(value)

    kernel = LIBRARIES.function(name, dtype, order)
    kernel(*map(address, arguments), address(torch.get_num_threads()))

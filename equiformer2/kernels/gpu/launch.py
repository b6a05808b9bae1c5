"""The one place that imports Triton: compile-time tables, data types, tile sizes, launches.

Tile sizes and warps are chosen by reasoning about registers and memory transactions, not by measurement.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.kernels.gpu import tables

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise InputError("the triton backend needs the package triton: pip install triton") from error
if not hasattr(triton, "constexpr_function"):
    raise InputError(f"the triton backend needs triton 3.4 or newer, not {triton.__version__}")

num_orders = triton.constexpr_function(tables.num_orders)
block_offset = triton.constexpr_function(tables.block_offset)
first_row = triton.constexpr_function(tables.first_row)
radial_row = triton.constexpr_function(tables.radial_row)

# The interpreter multiplies the bit patterns of bfloat16 matrices; there, products are taken in float32.
INTERPRETED = triton.knobs.runtime.interpret

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Sums are taken in float32; in float64 when an input is float64."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def expect(condition: bool, message: str) -> None:
    """Kernels read where their arguments say, so wrong shapes are refused in front of them."""
    if not condition:
        raise InputError(message)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor; nothing to do for an empty grid."""
    if 0 not in grid:
        run_kernel(kernel, grid, *arguments, **constants)


def run_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """What `launch` does; a check that kernels compile replaces it."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def channel_tile(channels: int) -> tuple[int, int]:
    """Channels of one program and how many programs cover them all.

    One warp each: 128 channels are four per thread, one 16-byte access in float32. Narrower tiles only
    where they leave fewer threads idle (96 channels: three tiles of 32).
    """
    block = min((128, 64, 32), key=lambda size: -(-channels // size) * size)
    return block, -(-channels // block)


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size`; tensor cores want no side below 16."""
    return max(least, triton.next_power_of_2(size))


def points_per_step(dtype: torch.dtype) -> int:
    """Grid points that a tensor-core loop takes at a time: as many as fit into the registers.

    Three TF32 products hold each operand twice.
    """
    return 64 if dtype.itemsize == 2 else 32


def dot_warps(dtype: torch.dtype) -> int:
    """Warps of a program with tensor-core products: two of Hopper's groups of four for wide operands."""
    return 4 if dtype.itemsize == 2 else 8


def columns_per_program(*rows: int) -> int:
    """Columns (edge or atom, channel) of one program: fewer where many coefficients fill its registers."""
    return 128 if max(power_of_two(count) for count in rows) <= 64 else 64


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """A constant matrix with zeros up to whole tiles: aligned rows, read 16 bytes at a time without masks."""
    return torch.nn.functional.pad(
        matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    ).contiguous()


def dot_precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply: float32 by three TF32 products, by one where torch allows it for its GEMMs.

    Three products keep float32's accuracy to within a few ulp.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"

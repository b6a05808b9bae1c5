"""The one place that imports Triton: compile-time tables, data types, tile sizes, launches.

Tile sizes and warps are chosen by reasoning about registers and memory transactions, not by measurement.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.kernels.layout import OrderLayout

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise InputError("the triton backend needs the package triton: pip install triton") from error
if not hasattr(triton, "constexpr_function"):
    raise InputError(f"the triton backend needs triton 3.4 or newer, not {triton.__version__}")

num_orders = triton.constexpr_function(OrderLayout.num_orders)
block_offset = triton.constexpr_function(OrderLayout.block_offset)
first_row = triton.constexpr_function(OrderLayout.first_row)
radial_row = triton.constexpr_function(OrderLayout.radial_row)

# The interpreter multiplies the bit patterns of bfloat16 matrices; there, products are taken in float32.
INTERPRETED = triton.knobs.runtime.interpret

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Data type of sums over the tensors: float32, or float64 when one of them is float64."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def expect(condition: bool, message: str) -> None:
    """Refuse wrong shapes in front of a kernel, which reads wherever its arguments say.

    Raises:
        InputError: `condition` is false.
    """
    if not condition:
        raise InputError(message)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor; nothing is run for an empty grid.

    Args:
        kernel: a Triton function.
        grid: number of programs along each axis.
        arguments: tensors and numbers that the kernel takes at run time.
        constants: its compile-time constants, and Triton's options such as `num_warps`.
    """
    if 0 not in grid:
        run_kernel(kernel, grid, *arguments, **constants)


def run_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel for a grid that is not empty; a check that kernels compile replaces this function."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def channel_tile(channels: int) -> tuple[int, int]:
    """Choose how one-warp programs share the channels of a row.

    128 channels are four per thread, one 16-byte access in float32. Narrower tiles only where they leave
    fewer threads idle (96 channels: three tiles of 32).

    Returns:
        Channels of one program, and the number of programs that cover them all.
    """
    block = min((128, 64, 32), key=lambda size: -(-channels // size) * size)
    return block, -(-channels // block)


def power_of_two(size: int, least: int = 16) -> int:
    """Round up to a power of two, at least `least`; tensor cores take no side below 16."""
    return max(least, triton.next_power_of_2(size))


def points_per_step(dtype: torch.dtype) -> int:
    """Grid points that a tensor-core loop takes at a time: as many as fit into the registers.

    Three TF32 products hold each operand twice.
    """
    return 64 if dtype.itemsize == 2 else 32


def columns_per_program(*rows: int) -> int:
    """Columns (edge or atom, channel) of one program: fewer where many coefficients fill its registers."""
    return 128 if max(power_of_two(count) for count in rows) <= 64 else 64


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Fill a constant matrix `[A, B]` with zeros up to whole tiles of `rows` by `columns`.

    Its rows are then aligned and are read 16 bytes at a time without masks.
    """
    return torch.nn.functional.pad(
        matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    ).contiguous()


def dot_constants(x: Tensor) -> dict[str, Any]:
    """Compile-time constants of a kernel that multiplies tiles of the type of `x` by tensor cores.

    Float32 is multiplied by three TF32 products, which keep its accuracy to within a few ulp, or by one where
    torch allows that for its GEMMs (`torch.set_float32_matmul_precision`). Wide operands take two of Hopper's
    groups of four warps.
    """
    precision = "ieee"
    if x.dtype == torch.float32:
        precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {
        "ACC": TRITON_DTYPES[accumulator(x)],
        "PRECISION": precision,
        "WIDEN": INTERPRETED,
        "num_warps": 4 if x.dtype.itemsize == 2 else 8,
    }

"""Feed-forward network on the sphere with the grid of a few atoms at a time.

The work is matrix products, of which the one through the D x C weight is a plain large GEMM. Fusing it too
would put the whole width of the hidden layer into one program's registers, which fits only up to 128
channels, and would leave the gradient of the weight to a sum over programs. So cuBLAS does that GEMM on the
grid of a chunk of atoms that fits in the L2 cache, and two kernels do the rest: coefficients to grid points,
SiLU included, and back. The gradient of the weight is one GEMM per chunk, added in sequence: deterministic.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from equiformer2.kernels.gpu.device_functions import dot, silu, silu_slope
from equiformer2.kernels.gpu.launch import (
    accumulator,
    columns_per_program,
    dot_constants,
    expect,
    launch,
    padded,
    points_per_step,
    power_of_two,
    tl,
    triton,
)

# Bytes of the grids of one chunk: two of them leave half of an A100's or H100's L2 cache to the rest.
_CHUNK_BYTES = 24 * 2**20

# Grid points of one tile; the matrices are padded to whole tiles.
_POINTS = 64

# Functions of the grid points that the kernels apply (`MODE`).
_SILU, _TIMES_SLOPE = 0, 1


def grid_mlp(x: Tensor, to_grid: Tensor, from_grid: Tensor, weight: Tensor) -> Tensor:
    """Grid points of SiLU(weight @ SiLU(x)), back to coefficients (see `kernels.grid_mlp`).

    Args:
        x: `[B, K, C]`; to_grid: `[G, K]`; from_grid: `[K, G]`; weight: `[D, C]`.
            The matrices are constants: they get no gradient.

    Returns:
        `[B, K, D]` in the data type of `x`.
    """
    constants = to_grid.to(x.dtype).contiguous(), from_grid.to(x.dtype).contiguous()
    return _GridMlp.forward(x.contiguous(), *constants, weight.to(x.dtype).contiguous())


class _GridMlp:
    """The operator, and its gradient."""

    @staticmethod
    @torch.library.custom_op("equiformer2::grid_mlp", mutates_args=())
    def forward(x: Tensor, to_grid: Tensor, from_grid: Tensor, weight: Tensor) -> Tensor:
        """Compute `grid_mlp` of contiguous arguments of one type."""
        fits = to_grid.shape[1] == x.shape[1] and from_grid.shape[1] == to_grid.shape[0]
        expect(fits, "grid_mlp: the grid matrices are not [G, K] and [K, G]")
        expect(weight.shape[1] == x.shape[2], f"grid_mlp: weight is not [D, {x.shape[2]}]")
        out = x.new_empty(len(x), len(from_grid), len(weight))
        sample, project = _GridMlp.padded_points(to_grid), _GridMlp.padded_rows(from_grid)
        with torch.autocast(x.device.type, enabled=False):
            for part in _GridMlp.chunks(len(x), to_grid, weight):
                activated = _GridMlp.sample(x[part], sample, len(to_grid), None)
                hidden = activated @ weight.t()
                _GridMlp.project(hidden, None, project, project, out[part])
        return out

    @staticmethod
    @torch.library.custom_op("equiformer2::grid_mlp_backward", mutates_args=())
    def gradients(
        grad: Tensor, x: Tensor, to_grid: Tensor, from_grid: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the coefficients and of the weight."""
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=accumulator(weight))
        points = len(to_grid)
        sample, sample_grad = _GridMlp.padded_points(to_grid), _GridMlp.padded_points(from_grid.t())
        project_grad = _GridMlp.padded_rows(to_grid.t())
        with torch.autocast(x.device.type, enabled=False):
            for part in _GridMlp.chunks(len(x), to_grid, weight):
                activated = _GridMlp.sample(x[part], sample, points, None)
                hidden = activated @ weight.t()
                grad_hidden = _GridMlp.sample(grad[part], sample_grad, points, hidden)
                grad_weight += grad_hidden.flatten(0, 1).t() @ activated.flatten(0, 1)
                grad_activated = grad_hidden @ weight
                _GridMlp.project(grad_activated, x[part], sample, project_grad, grad_x[part])
        return grad_x, grad_weight.to(weight.dtype)

    @staticmethod
    def chunks(batch: int, to_grid: Tensor, weight: Tensor) -> Iterator[slice]:
        """Cut the atoms so that the grids of one chunk stay in the L2 cache."""
        size = max(1, _CHUNK_BYTES // (len(to_grid) * sum(weight.shape) * weight.element_size()))
        for start in range(0, batch, size):
            yield slice(start, min(start + size, batch))

    @staticmethod
    def padded_points(matrix: Tensor) -> Tensor:
        """Fill `matrix [G, K]` with zeros up to whole tiles."""
        return padded(matrix, _POINTS, power_of_two(matrix.shape[1]))

    @staticmethod
    def padded_rows(matrix: Tensor) -> Tensor:
        """Fill `matrix [K, G]` with zeros up to whole tiles."""
        return padded(matrix, power_of_two(matrix.shape[0]), _POINTS)

    @staticmethod
    def sample(x: Tensor, matrix: Tensor, points: int, other: Tensor | None) -> Tensor:
        """Apply `matrix [G, K]` to `x [B, K, C]`, then SiLU, or multiply by its slope at `other`."""
        batch, rows, channels = x.shape
        out = x.new_empty(batch, points, channels)
        block = columns_per_program(rows)
        launch(
            _sample_kernel,
            (-(-batch * channels // block), len(matrix) // _POINTS),
            x,
            matrix,
            x if other is None else other,
            out,
            batch * channels,
            ROWS=rows,
            POINTS=points,
            C=channels,
            MODE=_SILU if other is None else _TIMES_SLOPE,
            BLOCK=block,
            BLOCK_ROWS=matrix.shape[1],
            BLOCK_POINTS=_POINTS,
            **dot_constants(x),
            num_stages=1,
        )
        return out

    @staticmethod
    def project(grid: Tensor, x: Tensor | None, to_grid: Tensor, matrix: Tensor, out: Tensor) -> None:
        """Write to `out [B, S, C]` the product of `matrix [S, G]` and SiLU of `grid [B, G, C]`.

        With `x`, `grid` is multiplied by the slope of SiLU at `to_grid @ x` instead.
        """
        batch, points, channels = grid.shape
        rows = 1 if x is None else x.shape[1]
        block = columns_per_program(rows, out.shape[1])
        launch(
            _project_kernel,
            (-(-batch * channels // block),),
            grid,
            grid if x is None else x,
            to_grid,
            matrix,
            out,
            batch * channels,
            ROWS=rows,
            OUT_ROWS=out.shape[1],
            POINTS=points,
            PADDED_POINTS=matrix.shape[1],
            C=channels,
            MODE=_SILU if x is None else _TIMES_SLOPE,
            BLOCK=block,
            BLOCK_ROWS=power_of_two(rows),
            BLOCK_OUT_ROWS=len(matrix),
            BLOCK_POINTS=points_per_step(grid.dtype),
            **dot_constants(grid),
            num_stages=2,
        )

    @classmethod
    def register(cls) -> None:
        """Tell compilers the shapes of the outputs, and autograd the derivative."""

        @cls.forward.register_fake
        def _(x, to_grid, from_grid, weight):  # type: ignore[no-untyped-def]
            return x.new_empty(x.shape[0], from_grid.shape[0], weight.shape[0])

        @cls.gradients.register_fake
        def _(grad, x, to_grid, from_grid, weight):  # type: ignore[no-untyped-def]
            return torch.empty_like(x), torch.empty_like(weight)

        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            grad_x, grad_weight = cls.gradients(grad.contiguous(), *ctx.saved_tensors)
            return grad_x, None, None, grad_weight

        cls.forward.register_autograd(
            backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
        )


_GridMlp.register()


@triton.jit
def _sample_kernel(  # type: ignore[no-untyped-def]
    x,
    matrix,
    other,
    out,
    num_columns,
    ROWS: tl.constexpr,
    POINTS: tl.constexpr,
    C: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = column < num_columns
    batch, channel = column // C, column % C
    row = tl.arange(0, BLOCK_ROWS)
    point = tl.program_id(1) * BLOCK_POINTS + tl.arange(0, BLOCK_POINTS)
    coefficients = tl.load(
        x + (batch * (ROWS * C) + channel)[None, :] + (row * C)[:, None],
        mask=valid[None, :] & (row < ROWS)[:, None],
        other=0.0,
    )
    tile = tl.load(matrix + point[:, None] * BLOCK_ROWS + row[None, :])
    # Points by columns: the result is written along the channels, where it is contiguous.
    grid = dot(tile, coefficients, None, ACC, PRECISION, WIDEN)
    offsets = (batch * (POINTS * C) + channel)[None, :] + (point * C)[:, None]
    mask = valid[None, :] & (point < POINTS)[:, None]
    if MODE == 0:
        grid = silu(grid)
    else:
        grid *= silu_slope(tl.load(other + offsets, mask=mask, other=0.0).to(ACC))
    tl.store(out + offsets, grid, mask=mask)


@triton.jit
def _project_kernel(  # type: ignore[no-untyped-def]
    grid,
    x,
    to_grid,
    matrix,
    out,
    num_columns,
    ROWS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    POINTS: tl.constexpr,
    PADDED_POINTS: tl.constexpr,
    C: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT_ROWS: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = column < num_columns
    batch, channel = column // C, column % C
    row, out_row = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_OUT_ROWS)
    if MODE != 0:
        coefficients = tl.load(
            x + (batch * (ROWS * C) + channel)[None, :] + (row * C)[:, None],
            mask=valid[None, :] & (row < ROWS)[:, None],
            other=0.0,
        )
    total = tl.full((BLOCK_OUT_ROWS, BLOCK), 0.0, ACC)
    for start in range(0, POINTS, BLOCK_POINTS):
        point = start + tl.arange(0, BLOCK_POINTS)
        values = tl.load(
            grid + (batch * (POINTS * C) + channel)[None, :] + (point * C)[:, None],
            mask=valid[None, :] & (point < POINTS)[:, None],
            other=0.0,
        )
        tile = tl.load(matrix + out_row[:, None] * PADDED_POINTS + point[None, :])
        if MODE == 0:
            factor = silu(values.to(ACC))
        else:
            to_tile = tl.load(to_grid + point[:, None] * BLOCK_ROWS + row[None, :])
            sampled = dot(to_tile, coefficients, None, ACC, PRECISION, WIDEN)
            factor = values.to(ACC) * silu_slope(sampled)
        total = dot(tile, factor.to(values.dtype), total, ACC, PRECISION, WIDEN)
    tl.store(
        out + (batch * (OUT_ROWS * C) + channel)[None, :] + (out_row * C)[:, None],
        total,
        mask=valid[None, :] & (out_row < OUT_ROWS)[:, None],
    )

"""S2 activation without a stored grid: a loop over tiles of grid points, in the shape of flash attention.

The columns (edge or atom, channel) of the coefficients are the "queries", `to_grid` the "keys", `from_grid`
the "values" and SiLU stands in place of the softmax: two chained tensor-core products per tile whose middle
factor is never stored. Bound by the evaluation of SiLU rather than by memory; the backward pass evaluates
the grid again.
"""

from typing import Any

import torch
from torch import Tensor

from equiformer2.kernels.gpu.device_functions import dot, silu, silu_slope
from equiformer2.kernels.gpu.launch import (
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


def separable_s2_activation(x: Tensor, gates: Tensor | None, to_grid: Tensor, from_grid: Tensor) -> Tensor:
    """S2 activation; with `gates` separable: row 0 is SiLU of the gates instead (paper section 4.3).

    Args:
        x: `[B, R, C]` coefficients of B edges or atoms.
        gates: `[B, C]` or None.
        to_grid: `[G, R]`; from_grid: `[S, G]`, S <= R. Constants: they get no gradient.

    Returns:
        `[B, S, C]` in the data type of `x`. Products in that type (float32: see `launch.dot_constants`), sums
        in float32.
    """
    fits = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    x = x if fits else x.contiguous()
    if gates is not None:
        gates = gates.to(x.dtype)
        gates = gates if gates.stride(1) == 1 else gates.contiguous()
    constants = to_grid.to(x.dtype).contiguous(), from_grid.to(x.dtype).contiguous()
    return _S2Activation.forward(x, gates, *constants)


class _S2Activation:
    """The operator, and its gradient."""

    @staticmethod
    @torch.library.custom_op("equiformer2::s2_activation", mutates_args=())
    def forward(x: Tensor, gates: Tensor | None, to_grid: Tensor, from_grid: Tensor) -> Tensor:
        """Compute `separable_s2_activation` of arguments of one type."""
        fits = to_grid.shape[1] == x.shape[1] and from_grid.shape[1] == to_grid.shape[0]
        expect(fits, "s2_activation: the grid matrices are not [G, R] and [S, G]")
        expect(gates is None or gates.shape == x[:, 0].shape, "s2_activation: gates are not [B, C]")
        out = x.new_empty(x.shape[0], from_grid.shape[0], x.shape[2])
        _S2Activation.launch(_s2_kernel, x, gates, to_grid, from_grid, (out,))
        return out

    @staticmethod
    @torch.library.custom_op("equiformer2::s2_activation_backward", mutates_args=())
    def gradients(
        grad: Tensor, x: Tensor, gates: Tensor | None, to_grid: Tensor, from_grid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the coefficients and of the gates (empty where there are none)."""
        grad_x = x.new_empty(x.shape)
        grad_gates = x.new_empty((0,) if gates is None else gates.shape)
        _S2Activation.launch(_s2_backward_kernel, x, gates, to_grid, from_grid, (grad, grad_x, grad_gates))
        return grad_x, grad_gates

    @staticmethod
    def launch(
        kernel: Any,
        x: Tensor,
        gates: Tensor | None,
        to_grid: Tensor,
        from_grid: Tensor,
        outputs: tuple[Tensor, ...],
    ) -> None:
        """Run a kernel over all columns (edge or atom, channel) of the coefficients."""
        batch, rows, channels = x.shape
        columns = batch * channels
        out_rows, points = len(from_grid), points_per_step(x.dtype)
        block = columns_per_program(rows, out_rows)
        block_rows, block_out_rows = power_of_two(rows), power_of_two(out_rows)
        # Padded grid points have zeros in `from_grid`.
        to_grid, from_grid = padded(to_grid, points, block_rows), padded(from_grid, block_out_rows, points)
        launch(
            kernel,
            (-(-columns // block),),
            x,
            x if gates is None else gates,
            to_grid,
            from_grid,
            *outputs,
            columns,
            x.stride(0),
            0 if gates is None else gates.stride(0),
            ROWS=rows,
            OUT_ROWS=out_rows,
            POINTS=len(to_grid),
            C=channels,
            GATED=gates is not None,
            BLOCK=block,
            BLOCK_ROWS=block_rows,
            BLOCK_OUT_ROWS=block_out_rows,
            BLOCK_POINTS=points,
            **dot_constants(x),
            num_stages=2,
        )

    @classmethod
    def register(cls) -> None:
        """Tell compilers the shapes of the outputs, and autograd the derivative."""

        @cls.forward.register_fake
        def _(x, gates, to_grid, from_grid):  # type: ignore[no-untyped-def]
            return x.new_empty(x.shape[0], from_grid.shape[0], x.shape[2])

        @cls.gradients.register_fake
        def _(grad, x, gates, to_grid, from_grid):  # type: ignore[no-untyped-def]
            return x.new_empty(x.shape), x.new_empty((0,) if gates is None else gates.shape)

        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            # Read once: activation checkpointing allows no more.
            saved = ctx.saved_tensors
            grad_x, grad_gates = cls.gradients(grad.contiguous(), *saved)
            return grad_x, grad_gates if saved[1] is not None else None, None, None

        cls.forward.register_autograd(
            backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
        )


_S2Activation.register()


@triton.jit
def _s2_kernel(  # type: ignore[no-untyped-def]
    x,
    gates,
    to_grid,
    from_grid,
    out,
    num_columns,
    x_stride,
    gates_stride,
    ROWS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    POINTS: tl.constexpr,
    C: tl.constexpr,
    GATED: tl.constexpr,
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
    coefficients = tl.load(
        x + (batch * x_stride + channel)[:, None] + (row * C)[None, :],
        mask=valid[:, None] & (row < ROWS)[None, :],
        other=0.0,
    )
    total = tl.full((BLOCK, BLOCK_OUT_ROWS), 0.0, ACC)
    for start in range(0, POINTS, BLOCK_POINTS):
        point = start + tl.arange(0, BLOCK_POINTS)
        to_tile = tl.load(to_grid + point[:, None] * BLOCK_ROWS + row[None, :])
        from_tile = tl.load(from_grid + out_row[:, None] * POINTS + point[None, :])
        grid = dot(coefficients, tl.trans(to_tile), None, ACC, PRECISION, WIDEN)
        activated = silu(grid).to(coefficients.dtype)
        total = dot(activated, tl.trans(from_tile), total, ACC, PRECISION, WIDEN)
    if GATED:
        gate = tl.load(gates + batch * gates_stride + channel, mask=valid, other=0.0).to(ACC)
        total = tl.where((out_row == 0)[None, :], silu(gate)[:, None], total)
    tl.store(
        out + (batch * (OUT_ROWS * C) + channel)[:, None] + (out_row * C)[None, :],
        total,
        mask=valid[:, None] & (out_row < OUT_ROWS)[None, :],
    )


@triton.jit
def _s2_backward_kernel(  # type: ignore[no-untyped-def]
    x,
    gates,
    to_grid,
    from_grid,
    grad,
    grad_x,
    grad_gates,
    num_columns,
    x_stride,
    gates_stride,
    ROWS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    POINTS: tl.constexpr,
    C: tl.constexpr,
    GATED: tl.constexpr,
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
    coefficients = tl.load(
        x + (batch * x_stride + channel)[:, None] + (row * C)[None, :],
        mask=valid[:, None] & (row < ROWS)[None, :],
        other=0.0,
    )
    # With gates, row 0 of the output does not come from the grid.
    grad_rows = tl.load(
        grad + (batch * (OUT_ROWS * C) + channel)[:, None] + (out_row * C)[None, :],
        mask=valid[:, None] & ((out_row < OUT_ROWS) & (out_row >= (1 if GATED else 0)))[None, :],
        other=0.0,
    ).to(coefficients.dtype)
    total = tl.full((BLOCK, BLOCK_ROWS), 0.0, ACC)
    for start in range(0, POINTS, BLOCK_POINTS):
        point = start + tl.arange(0, BLOCK_POINTS)
        to_tile = tl.load(to_grid + point[:, None] * BLOCK_ROWS + row[None, :])
        from_tile = tl.load(from_grid + out_row[:, None] * POINTS + point[None, :])
        grid = dot(coefficients, tl.trans(to_tile), None, ACC, PRECISION, WIDEN)
        grad_grid = dot(grad_rows, from_tile, None, ACC, PRECISION, WIDEN)
        grad_grid = (grad_grid * silu_slope(grid)).to(coefficients.dtype)
        total = dot(grad_grid, to_tile, total, ACC, PRECISION, WIDEN)
    tl.store(
        grad_x + (batch * (ROWS * C) + channel)[:, None] + (row * C)[None, :],
        total,
        mask=valid[:, None] & (row < ROWS)[None, :],
    )
    if GATED:
        gate = tl.load(gates + batch * gates_stride + channel, mask=valid, other=0.0).to(ACC)
        change = tl.load(grad + batch * (OUT_ROWS * C) + channel, mask=valid, other=0.0).to(ACC)
        tl.store(grad_gates + batch * C + channel, change * silu_slope(gate), mask=valid)

"""Second half of a message: attention weights times values, rotate back, sum over incoming edges.

Memory-bound: the values are read once and the sums written once; messages stay in registers. Edges are sorted
by target, so one program owns one atom, one degree and up to 128 channels and adds its edges in their
sequence, without atomics.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from equiformer2.kernels.gpu.device_functions import (
    add,
    add_rotated_back,
    load_degree,
    rotate_row,
    zero_degree,
)
from equiformer2.kernels.gpu.launch import (
    TRITON_DTYPES,
    accumulator,
    block_offset,
    channel_tile,
    expect,
    first_row,
    launch,
    num_orders,
    power_of_two,
    tl,
    triton,
)
from equiformer2.kernels.layout import OrderLayout


def rotate_aggregate(
    values: Tensor,
    alpha: Tensor | None,
    packed: Tensor,
    target: Tensor,
    target_ptr: Tensor,
    lmax: int,
    mmax: int,
    values_mmax: int,
    scale: Sequence[float],
) -> Tensor:
    """Sum over incoming edges of the values, weighted by attention and rotated back to the global frame.

    Args:
        values: `[E, R, C]` m-major coefficients of degrees 0..lmax and orders |m| <= values_mmax.
        alpha: `[E, H]` attention weights, each for C / H consecutive channels; None for plain sums.
        packed: `[E, P]` Wigner-D blocks as for `gather_rotate`, which may go on to higher degrees than
            lmax. A constant: it gets no gradient.
        target: `[E]` sorted target atoms.
        target_ptr: `[N + 1]` first edge of each target, from `segment_starts(target, N)`.
        lmax: degrees of the result.
        mmax: orders of the packed blocks.
        values_mmax: at most mmax; rows of higher orders are taken as zero.
        scale: factor of each degree 0..lmax.

    Returns:
        `[N, K, C]` in float32 (float64 for float64 values). Deterministic in value and gradient.
    """
    alpha = None if alpha is None else alpha.contiguous()
    sizes = lmax, mmax, values_mmax, [float(factor) for factor in scale[: lmax + 1]]
    # Only the stride between edges is free, so that slices of a GEMM's output need no copy.
    fits = values.stride(2) == 1 and values.stride(1) == values.shape[2]
    values = values if fits else values.contiguous()
    return _RotateAggregate.forward(values, alpha, packed.contiguous(), target, target_ptr, *sizes)


class _RotateAggregate:
    """The operator, and its gradient."""

    @staticmethod
    @torch.library.custom_op("equiformer2::rotate_aggregate", mutates_args=())
    def forward(
        values: Tensor,
        alpha: Tensor | None,
        packed: Tensor,
        target: Tensor,
        target_ptr: Tensor,
        lmax: int,
        mmax: int,
        values_mmax: int,
        scale: Sequence[float],
    ) -> Tensor:
        """Compute `rotate_aggregate` of contiguous arguments."""
        num_atoms, channels = len(target_ptr) - 1, values.shape[2]
        edges, rows = len(target), OrderLayout(lmax, values_mmax).num_rows
        expect(values_mmax <= mmax, f"rotate_aggregate: values_mmax {values_mmax} is above mmax {mmax}")
        expect(values.shape[:2] == (edges, rows), f"rotate_aggregate: values are not [{edges}, {rows}, C]")
        fits = len(packed) == edges and packed.shape[1] >= OrderLayout(lmax, mmax).packed_size
        expect(fits, "rotate_aggregate: packed does not fit lmax, mmax and E")
        expect(len(scale) == lmax + 1, f"rotate_aggregate: {len(scale)} factors for degrees 0 to {lmax}")
        if alpha is not None:
            fits = len(alpha) == edges and channels % alpha.shape[1] == 0
            expect(fits, f"rotate_aggregate: alpha is not [{edges}, a divisor of {channels}]")
        dtype = accumulator(values)
        out = values.new_empty(num_atoms, (lmax + 1) ** 2, channels, dtype=dtype)
        block, tiles = channel_tile(channels)
        launch(
            _aggregate_kernel,
            (num_atoms, (lmax + 1) * tiles),
            values,
            values if alpha is None else alpha,
            packed,
            target_ptr,
            out,
            values.stride(0),
            packed.shape[1],
            SCALE=tuple(scale),
            LMAX=lmax,
            MMAX=mmax,
            VALUES_MMAX=values_mmax,
            C=channels,
            HEADS=0 if alpha is None else alpha.shape[1],
            BLOCK=block,
            TILES=tiles,
            ACC=TRITON_DTYPES[dtype],
            num_warps=1,
        )
        return out

    @staticmethod
    @torch.library.custom_op("equiformer2::rotate_aggregate_backward", mutates_args=())
    def gradients(
        grad: Tensor,
        values: Tensor,
        alpha: Tensor | None,
        packed: Tensor,
        target: Tensor,
        lmax: int,
        mmax: int,
        values_mmax: int,
        scale: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the values and of the attention weights (empty where there are none)."""
        edges, rows, channels = values.shape
        grad_values = values.new_empty(edges, rows, channels)
        grad_alpha = values.new_empty(0) if alpha is None else torch.empty_like(alpha)
        if alpha is None:
            width, groups = channel_tile(channels)
        else:
            width, groups = channels // alpha.shape[1], alpha.shape[1]
        # A program holds whole heads, so that it can add up their channels.
        head_channels = power_of_two(width, 1)
        heads = max(1, min(power_of_two(groups, 1), 128 // head_channels))
        launch(
            _aggregate_backward_kernel,
            (edges, -(-groups // heads)),
            grad,
            values,
            values if alpha is None else alpha,
            packed,
            target,
            grad_values,
            grad_alpha,
            values.stride(0),
            packed.shape[1],
            SCALE=tuple(scale),
            LMAX=lmax,
            MMAX=mmax,
            VALUES_MMAX=values_mmax,
            C=channels,
            ROWS=rows,
            WEIGHTED=alpha is not None,
            GROUPS=groups,
            WIDTH=width,
            BLOCK_GROUPS=heads,
            BLOCK_WIDTH=head_channels,
            ACC=TRITON_DTYPES[accumulator(values)],
            num_warps=min(8, max(1, heads * head_channels // 128)),
        )
        return grad_values, grad_alpha

    @classmethod
    def register(cls) -> None:
        """Tell compilers the shapes of the outputs, and autograd the derivative."""

        @cls.forward.register_fake
        def _(values, alpha, packed, target, target_ptr, lmax, *rest):  # type: ignore[no-untyped-def]
            shape = target_ptr.shape[0] - 1, (lmax + 1) ** 2, values.shape[2]
            return values.new_empty(shape, dtype=accumulator(values))

        @cls.gradients.register_fake
        def _(grad, values, alpha, *rest):  # type: ignore[no-untyped-def]
            grad_alpha = values.new_empty(0) if alpha is None else torch.empty_like(alpha)
            return values.new_empty(values.shape), grad_alpha

        def setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
            values, alpha, packed, target, _, *ctx.sizes = inputs
            ctx.save_for_backward(values, alpha, packed, target)

        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            # Read once: activation checkpointing allows no more.
            saved = ctx.saved_tensors
            grad_values, grad_alpha = cls.gradients(grad.contiguous(), *saved, *ctx.sizes)
            return grad_values, grad_alpha if saved[1] is not None else None, *[None] * 7

        cls.forward.register_autograd(backward, setup_context=setup)


_RotateAggregate.register()


@triton.jit
def _aggregate_kernel(  # type: ignore[no-untyped-def]
    values,
    alpha,
    packed,
    starts,
    out,
    values_stride,
    packed_stride,
    SCALE: tl.constexpr,
    LMAX: tl.constexpr,
    MMAX: tl.constexpr,
    VALUES_MMAX: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
):
    atom = tl.program_id(0).to(tl.int64)
    degree = tl.program_id(1) // TILES
    channels = (tl.program_id(1) % TILES) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < C
    out += atom * ((LMAX + 1) * (LMAX + 1) * C)
    first, last = tl.load(starts + atom), tl.load(starts + atom + 1)
    for l in tl.static_range(LMAX + 1):
        if degree == l:
            columns = zero_degree(l, BLOCK, ACC)
            for edge in range(first, last):
                block = packed + edge * packed_stride + block_offset(l, MMAX)
                for m in tl.static_range(num_orders(l, VALUES_MMAX)):
                    for sign in tl.static_range(1 if m == 0 else 2):
                        row = first_row(m, LMAX) + sign * (LMAX + 1 - m) + l - m
                        pointers = values + edge * values_stride + row * C + channels
                        value = tl.load(pointers, mask=mask, other=0.0).to(ACC)
                        if HEADS > 0:
                            heads = alpha + edge * HEADS + channels // (C // HEADS)
                            value *= tl.load(heads, mask=mask, other=0.0).to(ACC)
                        columns = add_rotated_back(
                            columns, block, value, 0 if m == 0 else 2 * m - 1 + sign, l, ACC
                        )
            for k in tl.static_range(2 * l + 1):
                tl.store(out + (l * l + k) * C + channels, columns[k] * SCALE[l], mask=mask)


@triton.jit
def _aggregate_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    values,
    alpha,
    packed,
    target,
    grad_values,
    grad_alpha,
    values_stride,
    packed_stride,
    SCALE: tl.constexpr,
    LMAX: tl.constexpr,
    MMAX: tl.constexpr,
    VALUES_MMAX: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    # Channels as (group, channel of the group); groups are heads where there are attention weights.
    edge = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    within = tl.arange(0, BLOCK_WIDTH)
    channels = group[:, None] * WIDTH + within[None, :]
    mask = (group < GROUPS)[:, None] & (within < WIDTH)[None, :] & (channels < C)
    grad += tl.load(target + edge).to(tl.int64) * ((LMAX + 1) * (LMAX + 1) * C)
    blocks = packed + edge * packed_stride
    values += edge * values_stride
    grad_values += edge * (ROWS * C)
    total = tl.full((BLOCK_GROUPS, BLOCK_WIDTH), 0.0, ACC)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(alpha + edge * GROUPS + group, mask=group < GROUPS, other=0.0).to(ACC)[:, None]
    for l in tl.static_range(LMAX + 1):
        columns = load_degree(grad, channels, mask, l, C, ACC)
        for m in tl.static_range(num_orders(l, VALUES_MMAX)):
            for sign in tl.static_range(1 if m == 0 else 2):
                row = first_row(m, LMAX) + sign * (LMAX + 1 - m) + l - m
                block = blocks + block_offset(l, MMAX)
                value = rotate_row(block, columns, 0 if m == 0 else 2 * m - 1 + sign, l, ACC) * SCALE[l]
                if WEIGHTED:
                    total += value * tl.load(values + row * C + channels, mask=mask, other=0.0).to(ACC)
                tl.store(grad_values + row * C + channels, value * weight, mask=mask)
    if WEIGHTED:
        tl.store(grad_alpha + edge * GROUPS + group, tl.reduce(total, 1, add), mask=group < GROUPS)

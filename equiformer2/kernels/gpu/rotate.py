"""First half of a message: gather both atoms, rotate into the edge frame, multiply by the radial weights.

Memory-bound: the output, the radial weights and the Wigner-D blocks are read or written once; the
gathered features come from the L2 cache for all but the first edge of an atom. Forward, one program holds
one edge, one of its atoms and up to 128 channels; neither the gathered nor the rotated features leave the
registers.
"""

import torch
from torch import Tensor

from equiformer2.kernels.gpu.device_functions import add_rotated_back, load_degree, rotate_row, zero_degree
from equiformer2.kernels.gpu.launch import (
    TRITON_DTYPES,
    accumulator,
    block_offset,
    channel_tile,
    expect,
    first_row,
    launch,
    num_orders,
    radial_row,
    tl,
    triton,
)
from equiformer2.kernels.layout import OrderLayout


def gather_rotate(
    x: Tensor,
    packed: Tensor,
    source: Tensor,
    target: Tensor,
    radial: Tensor,
    lmax: int,
    mmax: int,
    shared_orders: bool,
    source_order: Tensor,
    source_ptr: Tensor,
    target_ptr: Tensor,
) -> Tensor:
    """`radial * rotate([x_source, x_target])` cut to |m| <= mmax, ready for one GEMM per order m.

    Args:
        x: `[N, K, C]` atom features.
        packed: `[E, at least P]` Wigner-D blocks of l = 0..L one after another, each row-major with rows
            m = 0, +1, -1, … (see `kernels.rotation`). A constant: it gets no gradient.
        source, target: `[E]` atom indices, sorted by target.
        radial: `[E, Q]` radial weights of (m, l, 2C) inputs, or of (l, 2C) when `shared_orders`.
        lmax, mmax: L and M.
        source_order, source_ptr: the edges grouped by source, from `csr(source, N)`.
        target_ptr: `[N + 1]` first edge of each target, from `segment_starts(target, N)`.

    Returns:
        `[E, R * 2C]` in the data type of `radial`: m-major rows, each with the C channels of the source and
        then those of the target. Deterministic in value and gradient.
    """
    return _GatherRotate.forward(
        x.contiguous(),
        packed.contiguous(),
        source,
        target,
        radial.contiguous(),
        lmax,
        mmax,
        shared_orders,
        source_order,
        source_ptr,
        target_ptr,
    )


class _GatherRotate:
    """The operator, and its gradients."""

    @staticmethod
    @torch.library.custom_op("equiformer2::gather_rotate", mutates_args=())
    def forward(
        x: Tensor,
        packed: Tensor,
        source: Tensor,
        target: Tensor,
        radial: Tensor,
        lmax: int,
        mmax: int,
        shared_orders: bool,
        source_order: Tensor,
        source_ptr: Tensor,
        target_ptr: Tensor,
    ) -> Tensor:
        """Compute `gather_rotate` of contiguous arguments."""
        edges, channels, layout = len(source), x.shape[2], OrderLayout(lmax, mmax)
        expect(
            x.shape[1] == (lmax + 1) ** 2, f"gather_rotate: x has {x.shape[1]} coefficients for lmax {lmax}"
        )
        expect(
            len(packed) == edges and packed.shape[1] >= layout.packed_size,
            "gather_rotate: packed does not fit lmax, mmax and E",
        )
        width = layout.radial_rows(shared_orders) * 2 * channels
        expect(radial.shape == (edges, width), f"gather_rotate: radial is not [{edges}, {width}]")
        expect(
            len(source_order) == len(target) == edges,
            "gather_rotate: source, target and source_order are not all [E]",
        )
        expect(
            len(source_ptr) == len(target_ptr) == len(x) + 1, "gather_rotate: the pointers are not [N + 1]"
        )
        out = radial.new_empty(edges, layout.num_rows * 2 * channels)
        block, tiles = channel_tile(channels)
        launch(
            _gather_rotate_kernel,
            (edges, 2 * tiles),
            x,
            packed,
            source,
            target,
            radial,
            out,
            packed.shape[1],
            LMAX=lmax,
            MMAX=mmax,
            SHARED=shared_orders,
            C=channels,
            BLOCK=block,
            TILES=tiles,
            Q=radial.shape[1],
            WIDTH=out.shape[1],
            ACC=TRITON_DTYPES[accumulator(x, radial)],
            num_warps=1,
        )
        return out

    @staticmethod
    @torch.library.custom_op("equiformer2::gather_rotate_grad_radial", mutates_args=())
    def grad_radial(
        grad: Tensor,
        x: Tensor,
        packed: Tensor,
        source: Tensor,
        target: Tensor,
        radial: Tensor,
        lmax: int,
        mmax: int,
        shared_orders: bool,
    ) -> Tensor:
        """Compute the gradient of the radial weights; the features are rotated again."""
        channels = x.shape[2]
        out = torch.empty_like(radial)
        block, tiles = channel_tile(channels)
        launch(
            _grad_radial_kernel,
            (len(source), 2 * tiles),
            grad,
            x,
            packed,
            source,
            target,
            out,
            packed.shape[1],
            LMAX=lmax,
            MMAX=mmax,
            SHARED=shared_orders,
            C=channels,
            BLOCK=block,
            TILES=tiles,
            Q=radial.shape[1],
            WIDTH=grad.shape[1],
            ACC=TRITON_DTYPES[accumulator(x, radial)],
            num_warps=1,
        )
        return out

    @staticmethod
    @torch.library.custom_op("equiformer2::gather_rotate_grad_x", mutates_args=())
    def grad_x(
        grad: Tensor,
        x: Tensor,
        packed: Tensor,
        radial: Tensor,
        lmax: int,
        mmax: int,
        shared_orders: bool,
        source_order: Tensor,
        source_ptr: Tensor,
        target_ptr: Tensor,
    ) -> Tensor:
        """Compute the gradient of the features of the atoms."""
        channels = x.shape[2]
        out = torch.empty_like(x)
        block, tiles = channel_tile(channels)
        launch(
            _grad_x_kernel,
            (len(x), (lmax + 1) * tiles),
            grad,
            packed,
            radial,
            source_order,
            source_ptr,
            target_ptr,
            out,
            packed.shape[1],
            LMAX=lmax,
            MMAX=mmax,
            SHARED=shared_orders,
            C=channels,
            BLOCK=block,
            TILES=tiles,
            Q=radial.shape[1],
            WIDTH=grad.shape[1],
            ACC=TRITON_DTYPES[accumulator(x, radial)],
            num_warps=1,
        )
        return out

    @classmethod
    def register(cls) -> None:
        """Tell compilers the shapes of the outputs, and autograd the derivative."""

        @cls.forward.register_fake
        def _(x, packed, source, target, radial, lmax, mmax, *rest):  # type: ignore[no-untyped-def]
            return radial.new_empty(source.shape[0], OrderLayout(lmax, mmax).num_rows * 2 * x.shape[2])

        cls.grad_radial.register_fake(
            lambda grad, x, packed, source, target, radial, *rest: torch.empty_like(radial)
        )
        cls.grad_x.register_fake(lambda grad, x, *rest: torch.empty_like(x))

        def setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
            x, packed, source, target, radial, lmax, mmax, shared_orders, *csr = inputs
            ctx.save_for_backward(x, packed, source, target, radial, *csr)
            ctx.sizes = lmax, mmax, shared_orders

        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            x, packed, source, target, radial, *csr = ctx.saved_tensors
            grad = grad.contiguous()
            grad_x = grad_radial = None
            if ctx.needs_input_grad[0]:
                grad_x = cls.grad_x(grad, x, packed, radial, *ctx.sizes, *csr)
            if ctx.needs_input_grad[4]:
                grad_radial = cls.grad_radial(grad, x, packed, source, target, radial, *ctx.sizes)
            return grad_x, None, None, None, grad_radial, *[None] * 6

        cls.forward.register_autograd(backward, setup_context=setup)


_GatherRotate.register()


@triton.jit
def _gather_rotate_kernel(  # type: ignore[no-untyped-def]
    x,
    packed,
    source,
    target,
    radial,
    out,
    packed_stride,
    LMAX: tl.constexpr,
    MMAX: tl.constexpr,
    SHARED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    Q: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    edge = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1) // TILES
    channels = (tl.program_id(1) % TILES) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < C
    atom = tl.load((source if side == 0 else target) + edge).to(tl.int64)
    blocks = packed + edge * packed_stride
    radial += edge * Q + side * C
    out += edge * WIDTH + side * C
    for l in tl.static_range(LMAX + 1):
        columns = load_degree(x + atom * ((LMAX + 1) * (LMAX + 1) * C), channels, mask, l, C, ACC)
        block = blocks + block_offset(l, MMAX)
        for m in tl.static_range(num_orders(l, MMAX)):
            weight = tl.load(
                radial + radial_row(l, m, LMAX, SHARED) * (2 * C) + channels, mask=mask, other=0.0
            ).to(ACC)
            for sign in tl.static_range(1 if m == 0 else 2):
                value = rotate_row(block, columns, 0 if m == 0 else 2 * m - 1 + sign, l, ACC) * weight
                row = first_row(m, LMAX) + sign * (LMAX + 1 - m) + l - m
                tl.store(out + row * (2 * C) + channels, value, mask=mask)


@triton.jit
def _grad_radial_kernel(  # type: ignore[no-untyped-def]
    grad,
    x,
    packed,
    source,
    target,
    out,
    packed_stride,
    LMAX: tl.constexpr,
    MMAX: tl.constexpr,
    SHARED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    Q: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    # The rotated features are computed again: reading them back would cost more than the arithmetic.
    edge = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1) // TILES
    channels = (tl.program_id(1) % TILES) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < C
    atom = tl.load((source if side == 0 else target) + edge).to(tl.int64)
    blocks = packed + edge * packed_stride
    grad += edge * WIDTH + side * C
    out += edge * Q + side * C
    for l in tl.static_range(LMAX + 1):
        columns = load_degree(x + atom * ((LMAX + 1) * (LMAX + 1) * C), channels, mask, l, C, ACC)
        block = blocks + block_offset(l, MMAX)
        total = tl.full((BLOCK,), 0.0, ACC)
        for m in tl.static_range(num_orders(l, MMAX)):
            for sign in tl.static_range(1 if m == 0 else 2):
                value = rotate_row(block, columns, 0 if m == 0 else 2 * m - 1 + sign, l, ACC)
                row = first_row(m, LMAX) + sign * (LMAX + 1 - m) + l - m
                total += value * tl.load(grad + row * (2 * C) + channels, mask=mask, other=0.0).to(ACC)
            if not SHARED:
                tl.store(out + radial_row(l, m, LMAX, SHARED) * (2 * C) + channels, total, mask=mask)
                total = tl.full((BLOCK,), 0.0, ACC)
        if SHARED:
            tl.store(out + l * (2 * C) + channels, total, mask=mask)


@triton.jit
def _add_edge(  # type: ignore[no-untyped-def]
    columns,
    edge,
    side: tl.constexpr,
    grad,
    packed,
    radial,
    packed_stride,
    channels,
    mask,
    l: tl.constexpr,
    LMAX: tl.constexpr,
    MMAX: tl.constexpr,
    SHARED: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add the gradient that one edge gives to degree l of its source (side 0) or target (side 1)."""
    block = packed + edge * packed_stride + block_offset(l, MMAX)
    radial += edge * Q + side * C
    grad += edge * WIDTH + side * C
    for m in tl.static_range(num_orders(l, MMAX)):
        weight = tl.load(
            radial + radial_row(l, m, LMAX, SHARED) * (2 * C) + channels, mask=mask, other=0.0
        ).to(ACC)
        for sign in tl.static_range(1 if m == 0 else 2):
            row = first_row(m, LMAX) + sign * (LMAX + 1 - m) + l - m
            value = tl.load(grad + row * (2 * C) + channels, mask=mask, other=0.0).to(ACC) * weight
            columns = add_rotated_back(columns, block, value, 0 if m == 0 else 2 * m - 1 + sign, l, ACC)
    return columns


@triton.jit
def _grad_x_kernel(  # type: ignore[no-untyped-def]
    grad,
    packed,
    radial,
    source_order,
    source_starts,
    target_starts,
    out,
    packed_stride,
    LMAX: tl.constexpr,
    MMAX: tl.constexpr,
    SHARED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    Q: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    # One program owns one atom, one degree and a tile of channels, and adds its edges in a fixed sequence:
    # no atomics. The blocks are diagonal in the degree, so no row is read by two programs.
    atom = tl.program_id(0).to(tl.int64)
    degree = tl.program_id(1) // TILES
    channels = (tl.program_id(1) % TILES) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < C
    out += atom * ((LMAX + 1) * (LMAX + 1) * C)
    for l in tl.static_range(LMAX + 1):
        if degree == l:
            columns = zero_degree(l, BLOCK, ACC)
            for edge in range(tl.load(target_starts + atom), tl.load(target_starts + atom + 1)):
                columns = _add_edge(
                    columns, edge, 1, grad, packed, radial, packed_stride, channels, mask,
                    l, LMAX, MMAX, SHARED, C, Q, WIDTH, ACC,
                )  # fmt: skip
            for i in range(tl.load(source_starts + atom), tl.load(source_starts + atom + 1)):
                edge = tl.load(source_order + i).to(tl.int64)
                columns = _add_edge(
                    columns, edge, 0, grad, packed, radial, packed_stride, channels, mask,
                    l, LMAX, MMAX, SHARED, C, Q, WIDTH, ACC,
                )  # fmt: skip
            for k in tl.static_range(2 * l + 1):
                tl.store(out + (l * l + k) * C + channels, columns[k], mask=mask)

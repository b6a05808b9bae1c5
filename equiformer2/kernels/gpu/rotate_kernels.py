"""Kernels of `gather_rotate`, its gradient to the radial weights and that to the features.

Memory-bound: what is read and written once is the output, the radial weights and the Wigner-D blocks; the
gathered features come from the L2 cache for all but the first edge of an atom. Forward, one program holds
one edge, one of its atoms and up to 128 channels; neither the gathered nor the rotated features leave the
registers.
"""

from equiformer2.kernels.gpu.degrees import add_rotated_back, load_degree, rotate_row, zero_degree
from equiformer2.kernels.gpu.launch import block_offset, first_row, num_orders, radial_row, tl, triton


@triton.jit
def gather_rotate_kernel(  # type: ignore[no-untyped-def]
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
def grad_radial_kernel(  # type: ignore[no-untyped-def]
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
def grad_x_kernel(  # type: ignore[no-untyped-def]
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

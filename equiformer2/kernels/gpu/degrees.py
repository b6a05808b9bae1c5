"""Device functions: one degree of the block-diagonal rotation, in registers.

A Wigner-D block is at most 17 x 17 and mostly much smaller, and differs between edges: too small for a
tensor core. Its entries are read one by one and broadcast over the channels that a program holds. The
coefficients of a degree are a tuple of vectors over these channels.
"""
# ruff: noqa: RUF005 (Triton adds tuples, but does not unpack them)

from equiformer2.kernels.gpu.launch import tl, triton


@triton.jit
def add(a, b):  # type: ignore[no-untyped-def]
    """For reductions."""
    return a + b


@triton.jit
def maximum(a, b):  # type: ignore[no-untyped-def]
    """For reductions."""
    return tl.maximum(a, b)


@triton.jit
def zero_degree(l: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """2l + 1 zero vectors."""
    columns = ()
    for _ in tl.static_range(2 * l + 1):
        columns = columns + (tl.full((BLOCK,), 0.0, ACC),)  # type: ignore[assignment]
    return columns


@triton.jit
def load_degree(  # type: ignore[no-untyped-def]
    x, channels, mask, l: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr
):
    """The 2l + 1 coefficients of degree l of one atom."""
    columns = ()
    for k in tl.static_range(2 * l + 1):
        columns = columns + (tl.load(x + (l * l + k) * C + channels, mask=mask, other=0.0).to(ACC),)  # type: ignore[assignment]
    return columns


@triton.jit
def rotate_row(  # type: ignore[no-untyped-def]
    block, columns, row: tl.constexpr, l: tl.constexpr, ACC: tl.constexpr
):
    """One row of the block times the coefficients."""
    total = tl.load(block + row * (2 * l + 1)).to(ACC) * columns[0]
    for k in tl.static_range(1, 2 * l + 1):
        total += tl.load(block + row * (2 * l + 1) + k).to(ACC) * columns[k]
    return total


@triton.jit
def add_rotated_back(  # type: ignore[no-untyped-def]
    columns, block, value, row: tl.constexpr, l: tl.constexpr, ACC: tl.constexpr
):
    """Add one row's contribution to the coefficients in the global frame."""
    updated = ()
    for k in tl.static_range(2 * l + 1):
        updated = updated + (columns[k] + tl.load(block + row * (2 * l + 1) + k).to(ACC) * value,)  # type: ignore[assignment]
    return updated

"""Device functions that several kernels share: rotations of one degree in registers, and work on grid points.

A Wigner-D block is at most 17 x 17 and mostly much smaller, and differs between edges: too small for a
tensor core. Its entries are read one by one and broadcast over the channels that a program holds. The
coefficients of a degree are a tuple of vectors over these channels. Grid points are made by tensor cores,
tile by tile.
"""
# ruff: noqa: RUF005 (Triton adds tuples, but does not unpack them)

from equiformer2.kernels.gpu.launch import tl, triton


@triton.jit
def add(a, b):  # type: ignore[no-untyped-def]
    """Combine two summands, for `tl.reduce`."""
    return a + b


@triton.jit
def maximum(a, b):  # type: ignore[no-untyped-def]
    """Combine two operands of a maximum, for `tl.reduce`."""
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


@triton.jit
def dot(a, b, total, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """`total + a @ b`, summed in ACC."""
    if WIDEN:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    """`x * sigmoid(x)`."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_slope(x):  # type: ignore[no-untyped-def]
    """Derivative of `silu` at `x`."""
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))

"""Device functions of the kernels that work on grid points: products of tiles, SiLU and its derivative."""

from equiformer2.kernels.gpu.launch import tl, triton


@triton.jit
def dot(a, b, total, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """`total + a @ b`, summed in ACC."""
    if WIDEN:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_slope(x):  # type: ignore[no-untyped-def]
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))

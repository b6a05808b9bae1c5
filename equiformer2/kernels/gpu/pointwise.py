"""Device functions: SiLU and its derivative."""

from equiformer2.kernels.gpu.launch import tl, triton


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_slope(x):  # type: ignore[no-untyped-def]
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))

"""The hot operations of the network, each a plain function of plain tensors.

Shapes: N atoms, E edges, K = (L+1)^2 coefficients, R coefficients with |m| <= mmax, C channels,
H heads, G grid points.

Every operation that would store a large edge tensor works through the edges (or atoms) in chunks and
recomputes the cheap intermediates in its backward pass: peak memory falls and the working set
stays in the processor's cache. Where a second derivative or the derivative with respect to the edge frames
is needed, the same forward code runs under ordinary autograd in one piece.
"""

from equiformer2.kernels.aggregate import attend, sum_rotated
from equiformer2.kernels.convolve import convolve_edges
from equiformer2.kernels.linear import linear
from equiformer2.kernels.rotation import pack_blocks
from equiformer2.kernels.rows import segment_softmax
from equiformer2.kernels.s2_grid import (
    GridFactors,
    grid_activation,
    grid_mlp,
    grid_product,
    separable_grid_activation,
)
from equiformer2.kernels.so2 import SO2Weights

__all__ = [
    "GridFactors",
    "SO2Weights",
    "attend",
    "convolve_edges",
    "grid_activation",
    "grid_mlp",
    "grid_product",
    "linear",
    "pack_blocks",
    "segment_softmax",
    "separable_grid_activation",
    "sum_rotated",
]

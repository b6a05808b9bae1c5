"""Index arithmetic shared by the host code and the kernels: layouts, and edges grouped by atom.

Plain integers in, plain integers out, so that a kernel can evaluate the same functions while it is compiled
(Triton then wants each of them to call builtins alone).
"""

import torch
from torch import Tensor


def num_orders(l: int, mmax: int) -> int:
    """Orders m = 0, 1, … that degree l keeps."""
    return min(l, mmax) + 1


def block_offset(l: int, mmax: int) -> int:
    """Where the block of degree l starts among the packed blocks of one edge."""
    return sum((2 * min(k, mmax) + 1) * (2 * k + 1) for k in range(l))


def first_row(m: int, lmax: int) -> int:
    """First row of order m in the m-major layout."""
    return 0 if m == 0 else (lmax + 1) + 2 * sum(lmax + 1 - k for k in range(1, m))


def radial_row(l: int, m: int, lmax: int, shared_orders: bool) -> int:
    """Which group of 2C radial weights multiplies degree l of order m."""
    return l if shared_orders else sum(lmax + 1 - k for k in range(m)) + l - m


def radial_rows(lmax: int, mmax: int, shared_orders: bool) -> int:
    """Groups of 2C radial weights in all."""
    return lmax + 1 if shared_orders else radial_row(mmax, mmax, lmax, False) + lmax + 1 - mmax


def packed_size(lmax: int, mmax: int) -> int:
    """P: entries of the packed blocks of one edge."""
    return block_offset(lmax + 1, mmax)


def num_rows(lmax: int, mmax: int) -> int:
    """R: coefficients with |m| <= mmax."""
    return first_row(min(lmax, mmax) + 1, lmax)


def segment_starts(index: Tensor, num: int) -> Tensor:
    """`[num + 1]` first edge of each atom, for `index [E]` that is sorted. Does not wait for the device."""
    return torch.searchsorted(index, torch.arange(num + 1, device=index.device, dtype=index.dtype))


def csr(index: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Group edges by atom, once per batch.

    Args:
        index: `[E]` atom of each edge, in any order.
        num: N.

    Returns:
        `order [E]`, a stable permutation that sorts the edges by atom, and `starts [N + 1]`: the edges of
        atom n are `order[starts[n]:starts[n + 1]]`, in their original sequence.
    """
    ordered, order = torch.sort(index, stable=True)
    return order, segment_starts(ordered, num)

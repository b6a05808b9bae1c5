"""Rotation of irreps between the global frame and the edge frames.

The Wigner-D matrices of an edge are one block per degree, `[min(2l, 2M) + 1, 2l + 1]`. Rows are the orders
that an SO(2) convolution keeps, in the sequence m = 0, +1, -1, +2, -2, …, so the cut to |m| <= M costs
nothing. Only these non-zero entries are kept per edge, `packed [E, P + 1]`: block after block, row by row,
and a zero at the end. A chunk of edges gets its rectangular matrices `[e, R, K]` from them when it is worked
on.

Rows and entries are numbered by `layout.OrderLayout`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from equiformer2.kernels.layout import OrderLayout


def pack_blocks(blocks: list[Tensor]) -> Tensor:
    """Store the entries of Wigner-D blocks one after another, and a zero.

    Args:
        blocks: `[E, min(2l, 2M) + 1, 2l + 1]` for l = 0..L, rows in the sequence m = 0, +1, -1, …

    Returns:
        `[E, P + 1]`.
    """
    zero = blocks[0].new_zeros(len(blocks[0]), 1)
    return torch.cat([*(block.flatten(1) for block in blocks), zero], dim=1)


def narrow_packed(packed: Tensor, degrees: tuple[int, int], kept: tuple[int, int]) -> Tensor:
    """Keep only the entries of low degrees and orders.

    Args:
        packed: `[E, P + 1]`.
        degrees: its highest degree and order.
        kept: highest degree and order to keep.

    Returns:
        `[E, P' + 1]`, packed in the same way.
    """
    return packed.index_select(1, _narrow_index(*degrees, *kept, packed.device))


def rotation_matrices(
    packed: Tensor, degrees: tuple[int, int], kept: tuple[int, int] | None = None
) -> Tensor:
    """Make the matrices that take coefficients in the global frame to m-major ones in the edge frame.

    Args:
        packed: `[e, P + 1]`.
        degrees: its highest degree and order.
        kept: highest degree and order of the coefficients; None for `degrees`.

    Returns:
        `[e, R, K]`; its transpose goes back.
    """
    kept = kept or degrees
    index = _entry_index(*degrees, *kept, packed.device)
    columns = (kept[0] + 1) ** 2
    return packed.index_select(1, index).view(len(packed), len(index) // columns, columns)


def _cached_index(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache index tensors, except in torch.compile, which makes constants of them and warns of caches."""
    cached = functools.cache(build)

    def index(*sizes: int | torch.device) -> Tensor:
        return build(*sizes) if torch.compiler.is_compiling() else cached(*sizes)

    return index


@_cached_index
def _narrow_index(lmax: int, mmax: int, to_lmax: int, to_mmax: int, device: torch.device) -> Tensor:
    """Columns of `packed` up to the degree and order (to_lmax, to_mmax), `[P' + 1]`."""
    index: list[int] = []
    for l in range(to_lmax + 1):
        start = OrderLayout.block_offset(l, mmax)
        index += range(start, start + (2 * min(l, to_mmax) + 1) * (2 * l + 1))
    return torch.tensor([*index, OrderLayout.block_offset(lmax + 1, mmax)], device=device)


@_cached_index
def _entry_index(lmax: int, mmax: int, to_lmax: int, to_mmax: int, device: torch.device) -> Tensor:
    """Columns of `packed` for every entry of the rectangular matrices, `[R * K]`; most are the zero."""
    zero = OrderLayout.block_offset(lmax + 1, mmax)
    index = []
    for l, m in OrderLayout(to_lmax, to_mmax).rows():
        row = [zero] * (to_lmax + 1) ** 2
        first = OrderLayout.block_offset(l, mmax) + (2 * abs(m) - (m > 0)) * (2 * l + 1)
        row[l * l : (l + 1) ** 2] = range(first, first + 2 * l + 1)
        index += row
    return torch.tensor(index, device=device)

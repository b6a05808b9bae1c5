"""Rotation of irreps between the global frame and the edge frames.

The Wigner-D matrices of an edge are one block per degree, `[min(2l, 2M) + 1, 2l + 1]`. Rows are the orders
that an SO(2) convolution keeps, in the sequence m = 0, +1, -1, +2, -2, …, so the cut to |m| <= M costs
nothing. What is kept per edge are these non-zero entries alone, `packed [E, P + 1]`: block after block, row
by row, and a zero at the end. A chunk of edges gets its rectangular matrices `[e, R, K]` from them when it is
worked on.

"m-major" below is the layout of the SO(2) convolutions: first m = 0 for l = 0..L, then for each m >= 1 the
L+1-m coefficients of +m and those of -m.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def pack_blocks(blocks: list[Tensor]) -> Tensor:
    """The entries of all blocks `[E, rows, 2l+1]` and a zero: `[E, P + 1]`."""
    zero = blocks[0].new_zeros(len(blocks[0]), 1)
    return torch.cat([*(block.flatten(1) for block in blocks), zero], dim=1)


def narrow_packed(packed: Tensor, degrees: tuple[int, int], kept: tuple[int, int]) -> Tensor:
    """The entries of `packed` up to the degree and order `kept`, packed again: `[E, P' + 1]`.

    `degrees`: highest degree and order of `packed`.
    """
    return packed.index_select(1, _traceable(_narrow_index)(*degrees, *kept, packed.device))


@functools.cache
def _narrow_index(lmax: int, mmax: int, to_lmax: int, to_mmax: int, device: torch.device) -> Tensor:
    index: list[int] = []
    start = 0
    for l in range(lmax + 1):
        if l <= to_lmax:
            index += range(start, start + (2 * min(l, to_mmax) + 1) * (2 * l + 1))
        start += (2 * min(l, mmax) + 1) * (2 * l + 1)
    return torch.tensor([*index, start], device=device)


def rotation_matrices(
    packed: Tensor, degrees: tuple[int, int], kept: tuple[int, int] | None = None
) -> Tensor:
    """Matrices that take coefficients in the global frame to m-major coefficients in the edge frame.

    Args:
        packed: `[e, P + 1]`.
        degrees: its highest degree and order.
        kept: highest degree and order wanted, if not all.

    Returns:
        `[e, R, K]`; its transpose goes back.
    """
    kept = kept or degrees
    index = _traceable(_entry_index)(*degrees, *kept, packed.device)
    columns = (kept[0] + 1) ** 2
    return packed.index_select(1, index).view(len(packed), len(index) // columns, columns)


@functools.cache
def _entry_index(lmax: int, mmax: int, to_lmax: int, to_mmax: int, device: torch.device) -> Tensor:
    """Where in `packed` every entry of the rectangular matrices is, `[R * K]`; the zero for most of them."""
    starts = [0]
    for l in range(lmax + 1):
        starts.append(starts[-1] + (2 * min(l, mmax) + 1) * (2 * l + 1))
    index = []
    for l, m in m_major_orders(to_lmax, to_mmax):
        block_row = 2 * abs(m) - (m > 0)
        row = [starts[-1]] * (to_lmax + 1) ** 2
        first = starts[l] + block_row * (2 * l + 1)
        row[l * l : (l + 1) ** 2] = range(first, first + 2 * l + 1)
        index += row
    return torch.tensor(index, device=device)


def _traceable(cached: "functools._lru_cache_wrapper[Tensor]") -> Callable[..., Tensor]:
    """torch.compile makes a constant of what it traces, and sees through caches only with a warning."""
    return cached.__wrapped__ if torch.compiler.is_compiling() else cached


def m_major_orders(lmax: int, mmax: int) -> list[tuple[int, int]]:
    """(l, m) of every row of the m-major layout."""
    orders = [(l, 0) for l in range(lmax + 1)]
    for m in range(1, mmax + 1):
        orders += [(l, sign * m) for sign in (1, -1) for l in range(m, lmax + 1)]
    return orders


def m_major_starts(lmax: int, mmax: int) -> list[int]:
    """First row of each order m in the m-major layout, and the number of rows R at the end."""
    starts = [0, lmax + 1]
    for m in range(1, mmax + 1):
        starts.append(starts[-1] + 2 * (lmax + 1 - m))
    return starts


def order_rows(lmax: int, m: int) -> tuple[int, int]:
    """For order m: how many components (1 for m = 0, else 2: +m and -m) and how many degrees l >= m."""
    return (1 if m == 0 else 2), lmax + 1 - m

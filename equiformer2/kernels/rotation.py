"""Block-diagonal rotation of irreps between the global frame and the edge frames.

The Wigner-D matrices of an edge come as one block per degree, `blocks[l]` of shape
`[E, min(2l, 2M) + 1, 2l + 1]`. Rows are the orders that an SO(2) convolution keeps, in the sequence
m = 0, +1, -1, +2, -2, …, so the cut to |m| <= M and the l-to-m permutation cost nothing extra.

"m-major" below is the layout of the SO(2) convolutions: first m = 0 for l = 0..L, then for each m >= 1 the
L+1-m coefficients of +m and those of -m.
"""

import torch
from torch import Tensor


def rotate_to_edges(parts: list[Tensor], blocks: list[Tensor]) -> Tensor:
    """Rotate coefficients into the edge frames.

    Args:
        parts: `[E, K, C]` each; their channels are concatenated in the result.
        blocks: see above.

    Returns:
        `[E, R, len(parts) * C]`, m-major.
    """
    rotated = [
        [torch.bmm(block, x[:, l * l : (l + 1) ** 2]) for x in parts] for l, block in enumerate(blocks)
    ]
    lmax = len(blocks) - 1
    mmax = (blocks[-1].shape[1] - 1) // 2
    rows = [(l, 0) for l in range(lmax + 1)]
    for m in range(1, mmax + 1):
        rows += [(l, 2 * m - 1) for l in range(m, lmax + 1)]
        rows += [(l, 2 * m) for l in range(m, lmax + 1)]
    # One copy does the l-to-m permutation and the concatenation of channels.
    pieces = [part[:, row : row + 1] for l, row in rows for part in rotated[l]]
    return torch.cat(pieces, dim=1).view(len(parts[0]), len(rows), -1)


def split_degrees(y: Tensor, lmax: int, mmax: int) -> list[Tensor]:
    """Collect the rows of each degree from m-major `[E, R, C]`: a list of `[E, min(2l, 2M) + 1, C]`."""
    start = m_major_starts(lmax, mmax)
    degrees = []
    for l in range(lmax + 1):
        rows = [l]
        for m in range(1, min(l, mmax) + 1):
            rows += [start[m] + l - m, start[m] + (lmax + 1 - m) + l - m]
        degrees.append(
            torch.cat([y[:, row : row + 1] for row in rows], dim=1) if len(rows) > 1 else y[:, l : l + 1]
        )
    return degrees


def rotate_from_edges(y: Tensor, blocks: list[Tensor], scale: list[float]) -> Tensor:
    """Rotate m-major `[E, R, C]` back to the global frame: `[E, K, C]`, degree l times `scale[l]`."""
    lmax = len(blocks) - 1
    mmax = (blocks[-1].shape[1] - 1) // 2
    parts = []
    for l, rows in enumerate(split_degrees(y, lmax, mmax)):
        part = torch.bmm(blocks[l].transpose(1, 2), rows)
        parts.append(part if scale[l] == 1.0 else part * scale[l])
    return torch.cat(parts, dim=1)


def m_major_starts(lmax: int, mmax: int) -> list[int]:
    """First row of each order m in the m-major layout, and the number of rows R at the end."""
    starts = [0, lmax + 1]
    for m in range(1, mmax + 1):
        starts.append(starts[-1] + 2 * (lmax + 1 - m))
    return starts


def order_rows(lmax: int, m: int) -> tuple[int, int]:
    """For order m: how many components (1 for m = 0, else 2: +m and -m) and how many degrees l >= m."""
    return (1 if m == 0 else 2), lmax + 1 - m

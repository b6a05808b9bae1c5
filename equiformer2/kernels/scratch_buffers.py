"""Memory that chunked loops use again and again.

The C library returns large blocks to the operating system when they are freed, and to get fresh pages costs
about as much time as to fill them. What lives for one chunk only is therefore kept.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# glibc maps blocks from a threshold on anew for each request. The threshold follows the largest such block
# that has been freed, but never beyond 32 MiB, and what it keeps of freed memory is twice that.
_LARGEST_KEPT = 2**25 - 2**16

#: Larger requests are not kept: a chunk should not be so large (`chunks.CPU_CHUNK_BYTES`).
MOST_BYTES = 64 * 2**20


def keep_freed_memory() -> None:
    """Let the C library of Linux keep up to 64 MiB of freed memory, in this process and from now on.

    By itself it comes to do so by chance, when blocks of the right size happen to be freed. Elsewhere, or if
    its `MALLOC_` variables are set, this changes nothing.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8, device="cpu")


class _Kept(threading.local):
    """Buffers by purpose, for each thread its own."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def bytes(self, purpose: str, size: int) -> Tensor:
        """Give the buffer of a purpose, of `size` bytes or more."""
        buffer = self.buffers.get(purpose)
        if buffer is None or len(buffer) < size:
            # A multiple of the widest number, so that the bytes can be read as any type.
            with torch.inference_mode(False):
                buffer = self.buffers[purpose] = torch.empty(
                    -(-size // 64) * 64, dtype=torch.uint8, device="cpu"
                )
        return buffer


_kept = _Kept()


def scratch(purpose: str, rows: int, widths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Give uninitialised contiguous tensors on the CPU, in memory that is used again.

    They are valid until the next call for the same purpose in the same thread, so nothing that outlives a
    chunk may be put there.

    Args:
        purpose: name of the buffer.
        rows: rows of every tensor.
        widths: columns of each tensor.
        dtype: of all tensors.

    Returns:
        Tensors `[rows, width]`, one for each width.
    """
    numbers = rows * sum(widths)
    if numbers * dtype.itemsize > MOST_BYTES:
        flat = torch.empty(numbers, dtype=dtype, device="cpu")
    else:
        flat = _kept.bytes(purpose, numbers * dtype.itemsize).view(dtype)[:numbers]
    return [
        part.view(rows, width)
        for part, width in zip(flat.split([rows * w for w in widths]), widths, strict=True)
    ]

"""Sizes of chunks of work, and the precision of chunked operations under autocast."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

# On a CPU the working set of a chunk should stay in the last-level cache; on a GPU chunks only bound memory.
CPU_CHUNK_BYTES = 48 * 2**20
# What is made and read at once should stay in a part of it.
CPU_CACHED_BYTES = 8 * 2**20
# Grid points are made, changed and read once: they should stay in the cores' own caches.
CPU_POINT_BYTES = 2 * 2**20
GPU_CHUNK_BYTES = 2**30


def chunks(
    rows: int,
    bytes_per_row: int,
    device: torch.device,
    reuse: Literal["chunk", "cached", "points"] = "chunk",
) -> Iterator[slice]:
    """Cut `range(rows)` into even consecutive slices with a working set near the device's budget.

    Args:
        rows: edges, atoms or other rows of work.
        bytes_per_row: working set of one row.
        device: the device that does the work.
        reuse: use of the working set, which chooses the budget on a CPU: `chunk` for a whole operation,
            `cached` for numbers that are made and read at once, `points` for point-wise work on a grid.

    Yields:
        Slices that cover the rows in order.
    """
    budget = GPU_CHUNK_BYTES
    if device.type == "cpu":
        budget = {"chunk": CPU_CHUNK_BYTES, "cached": CPU_CACHED_BYTES, "points": CPU_POINT_BYTES}[reuse]
    size = max(1, budget // max(1, bytes_per_row))
    if size < rows:
        # Even chunks: a short last one would waste a pass over the weights.
        size = -(-rows // -(-rows // size))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Context on the device of `tensor` in which every operation keeps the precision of its inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def cast_to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's precision where autocast is on, unchanged elsewhere.

    The chunked operations are autograd functions that autocast cannot look into, so the casts are made
    (and differentiated) in front of them.

    Args:
        tensors: on one device. Those in float32 are cast; others keep their type, as under autocast.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather `x[index]` of `x [N, K, C]`: whole rows of a matrix are copied several times faster."""
    return x.flatten(1).index_select(0, index).view(-1, *x.shape[1:])

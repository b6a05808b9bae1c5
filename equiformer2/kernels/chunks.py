"""How many rows a chunked operation works on at a time, and its precision under autocast."""

from collections.abc import Iterator

import torch
from torch import Tensor

# On a CPU the working set of a chunk should stay in the last-level cache; on a GPU chunks only bound memory.
CPU_CHUNK_BYTES = 48 * 2**20
# What is made and read at once should stay in a part of it.
CPU_CACHED_BYTES = 8 * 2**20
# Grid points are made, changed and read once: they should stay in the cores' own caches.
CPU_POINT_BYTES = 2 * 2**20
GPU_CHUNK_BYTES = 2**30


def chunks(rows: int, bytes_per_row: int, device: torch.device) -> Iterator[slice]:
    """Consecutive slices that cover `range(rows)`, each with a working set near the device's budget."""
    yield from _slices(rows, bytes_per_row, CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES)


def cached_chunks(rows: int, bytes_per_row: int, device: torch.device) -> Iterator[slice]:
    """The same for what is made and read at once."""
    yield from _slices(rows, bytes_per_row, CPU_CACHED_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES)


def point_chunks(rows: int, bytes_per_row: int, device: torch.device) -> Iterator[slice]:
    """The same for point-wise work on a grid."""
    yield from _slices(rows, bytes_per_row, CPU_POINT_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES)


def _slices(rows: int, bytes_per_row: int, budget: int) -> Iterator[slice]:
    size = max(1, budget // max(1, bytes_per_row))
    if size < rows:
        # Even chunks: a short last one would waste a pass over the weights.
        size = -(-rows // -(-rows // size))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which the precision of every operation is that of its inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def cast_to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's precision where autocast is on, unchanged elsewhere.

    The chunked operations are autograd functions that autocast cannot look into, so the casts are made
    (and differentiated) in front of them.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` for `x [N, K, C]`; whole rows of a matrix are copied several times faster."""
    return x.flatten(1).index_select(0, index).view(-1, *x.shape[1:])

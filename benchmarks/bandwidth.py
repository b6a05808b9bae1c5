"""The rate at which this machine moves numbers between its memory and its processor."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.numerics import now

# Of one array, far beyond what a processor's caches hold.
ARRAY_BYTES = 256 * 2**20


def measure_bandwidth(device: str, repeats: int, array_bytes: int = ARRAY_BYTES) -> dict[str, Any]:
    """Bytes per second read and written by a copy and by a triad `a = b + 2 c`, with torch's threads.

    Every array counts once per pass, as it is read or written: two in the copy, three in the triad. What a
    processor reads of the lines that it writes is not counted. Each time is the median after one warm-up.

    Returns:
        `copy`, `triad`, `rate` (of the faster one) and `array_bytes`.
    """
    size = array_bytes // torch.float32.itemsize
    # Written once here: untouched pages would be read from one page of zeros.
    a, b, c = (torch.full((size,), float(value), device=device) for value in range(3))
    copy = 2 * array_bytes / _median_seconds(lambda: a.copy_(b), device, repeats)
    triad = 3 * array_bytes / _median_seconds(lambda: torch.add(b, c, alpha=2.0, out=a), device, repeats)
    return {"copy": copy, "triad": triad, "rate": max(copy, triad), "array_bytes": array_bytes}


def _median_seconds(call: Callable[[], torch.Tensor], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = now(device)
        call()
        times.append(now(device) - start)
    return statistics.median(times[1:])

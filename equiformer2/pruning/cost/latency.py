"""Measured time of a network relative to the dense one.

Another program on the machine slows both down, so the two take turns, and the result is the median of the
ratios of neighbouring calls.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Latency:
    """Seconds per call, medians, and the ratio of neighbouring calls with its quartiles.

    Attributes:
        seconds: median time of the network, s.
        dense_seconds: median time of the dense network, s.
        ratio: median of network / dense.
        low: lower quartile of the ratio.
        high: upper quartile of the ratio.
        repeats: pairs of calls.
    """

    seconds: float
    dense_seconds: float
    ratio: float
    low: float
    high: float
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def compare_latency(
    network: Callable[[], object], dense: Callable[[], object], repeats: int = 10, warmup: int = 2
) -> Latency:
    """Time `network` and `dense` in turns; each is called without arguments.

    Args:
        network: call to time.
        dense: call to compare with.
        repeats: timed pairs of calls, at least 1.
        warmup: pairs of calls before, which are not timed.

    Returns:
        Medians, and the ratio of neighbouring calls.
    """

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times = np.empty((repeats, 2))
    for _ in range(warmup):
        network()
        dense()
    for row in range(repeats):
        # First one, then the other, begins: a clock that drifts then favours neither.
        for column in (0, 1) if row % 2 else (1, 0):
            synchronize()
            start = time.perf_counter()
            (network, dense)[column]()
            synchronize()
            times[row, column] = time.perf_counter() - start
    ratios = times[:, 0] / times[:, 1]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    seconds = np.median(times, axis=0)
    return Latency(float(seconds[0]), float(seconds[1]), float(middle), float(low), float(high), repeats)

"""Rates of the memory and of matrix products: which work is counted, and which time it is divided by."""

import time
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.worker import measure_bandwidth, measure_rate, median_seconds

MIB = 2**20


def test_the_first_call_is_a_warm_up_and_the_median_counts() -> None:
    waits = iter([0.5, 0.01, 0.03, 0.2])

    def call() -> torch.Tensor:
        time.sleep(next(waits))
        return torch.zeros(1)

    assert 0.03 <= median_seconds(call, "cpu", 3) < 0.2
    assert next(waits, None) is None


def test_bytes_are_those_read_and_written() -> None:
    """A clock that gives the warm-ups 9 s; then the copies 1, 2 and 4 s, the triads 2, 3 and 6 s."""
    passes = [9.0, 1.0, 4.0, 2.0, 9.0, 6.0, 2.0, 3.0]
    ticks = iter([tick for seconds in passes for tick in (0.0, seconds)])
    found = measure_bandwidth("cpu", 3, MIB, clock=lambda device: next(ticks))
    assert found == {"copy": 2 * MIB / 2.0, "triad": 3 * MIB / 3.0, "rate": MIB, "array_bytes": MIB}
    assert next(ticks, None) is None


class Operations(TorchDispatchMode):
    """Notes the bytes and the mean of the result of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, int, float]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.done.append((function.overloadpacket.__name__, result.nbytes, float(result.mean())))
        return result


def test_the_arrays_are_copied_and_added() -> None:
    with Operations() as operations:
        measure_bandwidth("cpu", 1, MIB)
    assert [one for one in operations.done if one[0] in ("copy_", "add")] == [
        *[("copy_", MIB, 1.0)] * 2,
        *[("add", MIB, 5.0)] * 2,
    ]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_best_product_is_at_least_as_fast_as_all(precision: str) -> None:
    found = measure_rate([(64, 32, 16), (64, 16, 48)], precision, "cpu", 2)
    assert found["shapes"] == [[64, 32, 16], [64, 16, 48]]
    assert found["best"] >= found["rate"] > 0

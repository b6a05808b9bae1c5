"""The rate of the memory: which bytes are counted, and which time they are divided by."""

import pytest
import torch

from benchmarks import bandwidth

MIB = 2**20


def test_bytes_are_those_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that gives the warm-ups 9 s; then the copies 1, 2 and 4 s, the triads 2, 3 and 6 s."""
    passes = [9.0, 1.0, 4.0, 2.0, 9.0, 6.0, 2.0, 3.0]
    ticks = iter([tick for seconds in passes for tick in (0.0, seconds)])
    monkeypatch.setattr(bandwidth, "now", lambda device: next(ticks))
    found = bandwidth.measure_bandwidth("cpu", 3, MIB)
    assert found == {"copy": 2 * MIB / 2.0, "triad": 3 * MIB / 3.0, "rate": MIB, "array_bytes": MIB}
    assert next(ticks, None) is None


def test_the_arrays_are_copied_and_added(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    full = torch.full

    def keep(*arguments: object, **options: object) -> torch.Tensor:
        made.append(full(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch, "full", keep)
    bandwidth.measure_bandwidth("cpu", 1, MIB)
    assert [array.nbytes for array in made] == [MIB] * 3
    assert [float(array.mean()) for array in made] == [5.0, 1.0, 2.0]

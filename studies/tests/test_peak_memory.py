"""Peak memory of a call, by counting what it allocates."""

import torch

from studies.peak_memory import peak_allocated

_MEGABYTE = 2**20


def floats(megabytes: int) -> torch.Tensor:
    return torch.zeros(megabytes * _MEGABYTE // 4)


def test_the_most_that_is_held_at_a_time() -> None:
    before = floats(64)

    def call() -> torch.Tensor:
        first = floats(8)
        second = floats(4)
        del first
        third = floats(2)
        return before[:1] + second[:1] + third[:1]

    peaks = [peak_allocated(call) for _ in range(2)]
    assert peaks[0] == peaks[1]
    assert 12 * _MEGABYTE <= peaks[0] < 12.1 * _MEGABYTE


def test_what_was_there_before_and_goes_is_no_negative_peak() -> None:
    held = [floats(16)]
    assert peak_allocated(held.clear) == 0
    assert peak_allocated(lambda: None) == 0

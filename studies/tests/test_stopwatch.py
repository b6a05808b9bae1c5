"""Duration of a study over calls that were stopped."""

import time
from pathlib import Path

import pytest

from studies.stopwatch import Stopwatch, in_words, read_seconds


@pytest.fixture
def clock() -> list[float]:
    """Time of the stopwatches of a test, s."""
    return [100.0]


def stopwatch(folder: Path, clock: list[float]) -> Stopwatch:
    return Stopwatch(folder, lambda: clock[0], 0.01)


def stopped(watch: Stopwatch, clock: list[float]) -> None:
    with watch.part("wide"):
        clock[0] += 1740.0
        raise KeyboardInterrupt


def test_calls_add_up(tmp_path: Path, clock: list[float]) -> None:
    folder = tmp_path / "study"
    for name, seconds in (("lossless", 60.0), ("small", 1200.0), ("small", 600.0)):
        with stopwatch(folder, clock).part(name):
            clock[0] += seconds
    with pytest.raises(KeyboardInterrupt):
        stopped(stopwatch(folder, clock), clock)
    assert read_seconds(folder) == {"lossless": 60.0, "small": 1800.0, "wide": 1740.0}
    assert in_words(read_seconds(folder)) == "Computed in 1.00 h (lossless 1 min, small 30 min, wide 29 min)."


def test_a_killed_call_has_noted_its_time(tmp_path: Path, clock: list[float]) -> None:
    folder = tmp_path / "study"
    with stopwatch(folder, clock).part("small"):
        assert read_seconds(folder) == {"small": 0.0}
        clock[0] += 50.0
        end = time.monotonic() + 30.0
        while read_seconds(folder) != {"small": 50.0}:
            assert time.monotonic() < end, "the time was not noted while the part ran"
            time.sleep(0.01)


def test_results_of_unknown_times_are_not_timed(tmp_path: Path, clock: list[float]) -> None:
    with stopwatch(tmp_path, clock).part("small"):
        clock[0] += 50.0
    assert list(tmp_path.iterdir()) == []
    assert read_seconds(tmp_path) == {}
    assert in_words({}) == ""


def test_a_broken_file_is_no_time(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "seconds.json").write_text('{"small": [')
    with stopwatch(tmp_path, clock).part("small"):
        clock[0] += 50.0
    assert read_seconds(tmp_path) == {}

"""How long a study took, over calls that were stopped."""

from pathlib import Path

import pytest

from equiformer2.files import write_json
from studies import stopwatch
from studies.stopwatch import Stopwatch, in_words, read_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: now[0])
    return now


def stopped(watch: Stopwatch, clock: list[float]) -> None:
    with watch.part("wide"):
        clock[0] += 1740.0
        raise KeyboardInterrupt


def test_calls_add_up(tmp_path: Path, clock: list[float]) -> None:
    folder = tmp_path / "study"
    for name, seconds in (("lossless", 60.0), ("small", 1200.0), ("small", 600.0)):
        with Stopwatch(folder).part(name):
            clock[0] += seconds
    with pytest.raises(KeyboardInterrupt):
        stopped(Stopwatch(folder), clock)
    assert read_seconds(folder) == {"lossless": 60.0, "small": 1800.0, "wide": 1740.0}
    assert in_words(read_seconds(folder)) == "Computed in 1.00 h (lossless 1 min, small 30 min, wide 29 min)."


def test_a_killed_call_has_noted_its_time(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "_EVERY", 0.01)
    noted = stopwatch.threading.Event()
    seconds: list[float] = []

    def write(path: Path, record: dict[str, float], make_folder: bool) -> None:
        write_json(path, record, make_folder)
        seconds.append(record["small"])
        if record["small"] == 50.0:
            noted.set()

    monkeypatch.setattr(stopwatch, "write_json", write)
    with Stopwatch(tmp_path / "study").part("small"):
        clock[0] += 50.0
        assert noted.wait(10.0)
        assert read_seconds(tmp_path / "study") == {"small": 50.0}
    assert seconds[0] == 0.0


def test_results_of_unknown_times_are_not_timed(tmp_path: Path, clock: list[float]) -> None:
    with Stopwatch(tmp_path).part("small"):
        clock[0] += 50.0
    assert list(tmp_path.iterdir()) == []
    assert read_seconds(tmp_path) == {}
    assert in_words({}) == ""


def test_a_broken_file_is_no_time(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "seconds.json").write_text('{"small": [')
    with Stopwatch(tmp_path).part("small"):
        clock[0] += 50.0
    assert read_seconds(tmp_path) == {}

"""Order of the measurements and what the report makes of them."""

from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.measure import Benchmark, Settings
from bench.report import figure, markdown, speed_up

GIB = 2**30
SECONDS = {
    ("reference", "forward"): 3.0,
    ("reference", "forward_as_shipped"): 2.8,
    ("reference", "training_step"): 8.0,
    ("ours", "forward"): 1.4,
    ("ours", "training_step"): 8.0,
}


class FakeSession:
    """Answers like a worker whose training step takes 0.1 GiB (half of that in ours) per atom."""

    log: list[tuple[str, str]] = []  # noqa: RUF012 - shared on purpose, reset by the fixture

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def __enter__(self) -> "FakeSession":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        if command == "describe":
            return {"name": self.implementation, "version": "1", "torch": "2", "python": "3"}
        if command == "build":
            self.atoms = {"B1": 73, "B4": 300}[arguments["batch"]]
            return {"parameters": 1000, "atoms": self.atoms, "peak": GIB}
        if command == "run":
            operation = arguments["operation"]
            self.log.append((self.implementation, operation))
            return {"seconds": SECONDS[self.implementation, operation]}
        if command == "memory":
            per_atom = 0.1 if self.implementation == "reference" else 0.05
            return {"before_model": GIB // 2, "peak": int(GIB * (1 + per_atom * self.atoms))}
        return {}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(FakeSession, "log", [])
    monkeypatch.setattr(
        Settings, "session", lambda self, implementation, allocator: FakeSession(implementation)
    )
    monkeypatch.setattr(measure, "compare_answers", lambda ours, reference: [])
    monkeypatch.setattr(measure, "machine_memory", lambda: 24 * GIB)
    return Settings("python", "python", ("31M",), ("B1", "B4"), ("default",), repeats=3, threads=2)


def run(settings: Settings) -> dict[str, Any]:
    results = Benchmark(settings, lambda results: None, lambda line: None).run()
    machine = {"processor": "a", "cores": 2, "memory_gib": 24.0, "system": "b", "load_average_before": 0.1}
    return results | {"machine": machine, "command": "python scripts/benchmark.py"}


def test_calls_alternate_after_one_warm_up(settings: Settings) -> None:
    run(settings)
    forwards = [call for call in FakeSession.log if call[1] != "training_step"][: 3 * 4]
    turn = [("reference", "forward"), ("reference", "forward_as_shipped"), ("ours", "forward")]
    assert forwards == turn * (settings.repeats + 1)


def test_what_does_not_fit_is_left_out_and_named(settings: Settings) -> None:
    results = run(settings)
    # 300 atoms at 0.1 GiB each: more than 24 GiB; the forward without its autograd graph remains.
    timed = [(row["batch"], row["operation"], tuple(row["reference"])) for row in results["timings"]]
    assert timed == [
        ("B1", "forward", ("forward", "forward_as_shipped")),
        ("B1", "training step", ("training_step",)),
        ("B4", "forward", ("forward",)),
    ]
    assert [row["batch"] for row in results["memory"]] == ["B1"]
    assert any("B4 training step" in reason for reason in results["left_out"])


def test_speed_up_is_against_the_fastest_reference(settings: Settings) -> None:
    first = run(settings)["timings"][0]
    assert speed_up(first) == pytest.approx(2.8 / 1.4)


def test_report_says_which_floors_hold(settings: Settings) -> None:
    text = markdown(run(settings))
    rows = [line for line in text.splitlines() if line.startswith("| 31M | B1")]
    assert [row.split("|")[-2].strip() for row in rows] == ["yes", "no", "yes"]
    assert "## Left out" in text


def test_figure_shows_every_measurement(settings: Settings, tmp_path: Path) -> None:
    plot = figure(run(settings))
    plot.savefig(tmp_path / "figure.png")
    time_axis, memory_axis = plot.axes
    assert [len(axis.patches) for axis in (time_axis, memory_axis)] == [2 * 3, 2 * 1]

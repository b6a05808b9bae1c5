"""Context that all measurements share: sessions, parameters, comparison of answers, interleaved calls."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.answer_comparison import Comparison
from benchmarks.benchmark_results import Store
from benchmarks.benchmark_settings import Call, Settings
from benchmarks.machine import machine_memory
from benchmarks.network_sizes import SIZES
from benchmarks.worker_session import BenchmarkError, Session

REFERENCE_DRAWS = 3
# Share of the machine's memory that the workers may need; beyond it a measurement is left out, with a note.
USABLE_SHARE = 0.9


class Benchmark:
    """Context of the parts.

    Args:
        settings: what to measure.
        store: results file.
        folder: for files that sessions exchange; it may go when the benchmark ends.
        save: called whenever a unit is complete.
        say: called with lines of progress.
        memory: bytes of this machine; None to ask it.

    Attributes:
        usable_memory: bytes that all workers together may need; infinite with a GPU, which refuses by itself.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        folder: Path,
        save: Callable[[], None],
        say: Callable[[str], None],
        memory: int | None = None,
    ) -> None:
        self.settings, self.store, self.folder = settings, store, folder
        self.save, self.say = save, say
        total = machine_memory() if memory is None else memory
        self.usable_memory = USABLE_SHARE * total if settings.device == "cpu" else math.inf
        self._parameters: dict[str, Path] = {}

    def unit(
        self, name: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The record of a unit: the stored one if it is complete, else a new one."""
        record = self.store.find(name)
        if record is not None and self.store.complete(name, settings):
            self.say(f"{name}: complete already (--force measures it again)")
            return record
        record = measure()
        self.store.put(name, settings, record)
        self.save()
        return record

    def parameters(self, size: str) -> Path:
        """File with the parameters of a size: drawn by the reference, or by ours where there is none."""
        if size not in self._parameters:
            path = self.folder / f"{size}.pt"
            drawn_by = "ours" if self.settings.reference_python is None else "reference"
            with self.settings.session(drawn_by, "default") as session:
                request = {"config": SIZES[size], "parameters": str(path), "create": True, "batch": "B1"}
                session.ask("build", **request)
            self._parameters[size] = path
        return self._parameters[size]

    def build(self, session: Session, size: str, batch: str) -> dict[str, Any]:
        """Give the session the network of a size with the common parameters, and a batch."""
        path = str(self.parameters(size))
        return session.ask("build", config=SIZES[size], parameters=path, create=False, batch=batch)

    def interleave(
        self, sessions: dict[str, Session], calls: list[Call], label: str, repeats: int
    ) -> list[dict[str, Any]]:
        """The calls with their seconds, after one warm-up each: reference, ours, reference, ours, …"""
        seconds: dict[Call, list[float]] = {call: [] for call in calls}
        for repeat in range(-1, repeats):
            taken = {
                call: sessions[call.implementation].ask("run", **call.request)["seconds"] for call in calls
            }
            line = ", ".join(f"{call.label} {value:.3g} s" for call, value in taken.items())
            turn = "warm-up" if repeat < 0 else f"{repeat + 1}/{repeats}"
            self.say(f"{label}, {turn}: {line}")
            if repeat >= 0:
                for call, value in taken.items():
                    seconds[call].append(value)
        return [asdict(call) | {"seconds": values} for call, values in seconds.items()]

    def judge(self, label: str, rows: list[Comparison]) -> list[dict[str, Any]]:
        """The comparisons as plain values.

        Raises:
            BenchmarkError: the answers differ: then a timing would mean nothing.
        """
        for row in rows:
            self.say(
                f"{label} {row.quantity}: differs by {row.difference:.1e} (allowed"
                f" {row.tolerance:.1e}, the reference's own scatter {row.scatter:.1e}, rms {row.rms:.1e})"
            )
        wrong = [row.quantity for row in rows if not row.agrees]
        if wrong:
            raise BenchmarkError(f"{label}: answers differ in {', '.join(wrong)}; nothing was timed")
        return [asdict(row) for row in rows]

    def leave_out(self, record: dict[str, Any], reason: str) -> None:
        """Note in the record, and say, what was not measured and why."""
        self.say(f"left out: {reason}")
        record.setdefault("left_out", []).append(reason)

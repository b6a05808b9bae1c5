"""The order of the measurements and what they share: sessions, parameters, comparison, interleaved calls."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.answer_comparison import Comparison
from benchmarks.benchmark_results import Store
from benchmarks.benchmark_settings import Call, Settings
from benchmarks.network_sizes import SIZES
from benchmarks.worker_session import BenchmarkError, Session

# Share of the machine's memory that the workers may need; beyond it a measurement is left out, with a note.
USABLE_MEMORY = 0.9
REFERENCE_DRAWS = 3


class Benchmark:
    """Context of the parts. `save` is called whenever a unit is complete, `say` with progress."""

    def __init__(
        self, settings: Settings, store: Store, save: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        self.settings, self.store = settings, store
        self.save, self.say = save, say
        self.folder = Path()
        self._parameters: dict[str, Path] = {}

    def run(self) -> None:
        """Measure all parts that are not complete."""
        # Imported here: the parts need this module's class.
        from benchmarks import (
            part_atoms,
            part_breakdown,
            part_memory,
            part_precision,
            part_relaxation,
            part_timings,
        )

        # Memory comes before the timings: it tells what fits into this machine.
        parts = {
            "memory": part_memory.measure,
            "timings": part_timings.measure,
            "precision": part_precision.measure,
            "relaxation": part_relaxation.measure,
            "breakdown": part_breakdown.measure,
            "atoms": part_atoms.measure,
            "training_atoms": part_atoms.measure_training,
        }
        with tempfile.TemporaryDirectory() as name:
            self.folder = Path(name)
            for size in self.settings.sizes:
                for part, measure in parts.items():
                    if part in self.settings.parts:
                        measure(self, size)

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


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

"""What is measured, in which order: memory, then (answers compared first) interleaved timings."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.compare import compare_answers
from bench.session import BenchmarkError, Session
from bench.sizes import SIZES

# Share of the machine's memory that the workers may need; beyond it a measurement is left out, with a note.
USABLE_MEMORY = 0.9
REFERENCE_DRAWS = 3
# The reference's forward: inference as users should run it, and as its own code runs it inside `no_grad`.
OPERATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "forward": {"reference": ("forward", "forward_as_shipped"), "ours": ("forward",)},
    "training step": {"reference": ("training_step",), "ours": ("training_step",)},
}


@dataclass(frozen=True)
class Settings:
    """One benchmark: which Pythons, what to measure and how often."""

    ours_python: str
    reference_python: str
    sizes: tuple[str, ...]
    batches: tuple[str, ...]
    allocators: tuple[str, ...]
    repeats: int
    threads: int

    def session(self, implementation: str, allocator: str) -> Session:
        python = self.ours_python if implementation == "ours" else self.reference_python
        return Session(implementation, python, self.threads, allocator)


class Benchmark:
    """Fills `results`; `save` is called whenever a part is complete, `say` with progress."""

    def __init__(
        self, settings: Settings, save: Callable[[dict[str, Any]], None], say: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.save = save
        self.say = say
        self.results: dict[str, Any] = {
            "settings": asdict(settings),
            "implementations": {},
            "answers": [],
            "memory": [],
            "timings": [],
            "left_out": [],
        }

    def run(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for size in self.settings.sizes:
                self._draw_parameters(size, folder)
                for batch in self.settings.batches:
                    # Memory comes before the timings: it tells what fits into this machine.
                    self._memory(size, batch, folder)
                for batch in self.settings.batches:
                    for allocator in self.settings.allocators:
                        self._timings(size, batch, allocator, folder)
        return self.results

    def _draw_parameters(self, size: str, folder: Path) -> None:
        with self.settings.session("reference", "default") as reference:
            self._build(reference, size, self.settings.batches[0], folder, create=True)

    def _build(
        self, session: Session, size: str, batch: str, folder: Path, create: bool = False
    ) -> dict[str, Any]:
        return session.ask(
            "build", config=SIZES[size], parameters=str(folder / f"{size}.pt"), create=create, batch=batch
        )

    def _memory(self, size: str, batch: str, folder: Path) -> None:
        """Peak memory of two training steps, each implementation in a fresh process.

        Two, because the optimizer's state exists only from the end of the first step.
        """
        row: dict[str, Any] = {"size": size, "batch": batch}
        for implementation in ("reference", "ours"):
            with self.settings.session(implementation, "default") as session:
                self.results["implementations"][implementation] = session.ask("describe")
                built = self._build(session, size, batch, folder)
                expected = self._expected_peak(size, implementation, built)
                if expected > USABLE_MEMORY * machine_memory():
                    need = f"{implementation} would need about {expected / 2**30:.0f} GiB"
                    self._leave_out(f"{size} {batch} memory of a training step: {need}")
                    return
                self.say(f"{size} {batch} memory of a training step, {implementation}")
                for _ in range(2):
                    session.ask("run", operation="training_step")
                row |= {"atoms": built["atoms"], "parameters": built["parameters"]}
                row[implementation] = session.ask("memory") | {"built": built["peak"]}
        self.results["memory"].append(row)
        self.save(self.results)

    def _expected_peak(self, size: str, implementation: str, built: dict[str, Any]) -> float:
        """From what a smaller batch took: activations grow with the number of atoms."""
        for row in self.results["memory"]:
            if row["size"] == size:
                known = row[implementation]
                return built["peak"] + (known["peak"] - known["built"]) * built["atoms"] / row["atoms"]
        return 0.0

    def _timings(self, size: str, batch: str, allocator: str, folder: Path) -> None:
        memory = next((r for r in self.results["memory"] if (r["size"], r["batch"]) == (size, batch)), None)
        training_fits = memory is not None and self._training_fits(memory, allocator)
        with (
            self.settings.session("reference", allocator) as reference,
            self.settings.session("ours", allocator) as ours,
        ):
            sessions = {"reference": reference, "ours": ours}
            for session in sessions.values():
                self._build(session, size, batch, folder)
            if allocator == self.settings.allocators[0]:
                self._compare(sessions, size, batch, folder, gradients=training_fits)
            for operation, variants in OPERATIONS.items():
                label = f"{size} {batch} {operation}, {allocator} allocator"
                if not training_fits:
                    if operation == "training step":
                        self._leave_out(f"{label}: not enough memory")
                        continue
                    # As shipped, the reference's forward takes the memory of a training step.
                    self._leave_out(f"{label}, fairchem-core as shipped: not enough memory")
                    variants = {"reference": ("forward",), "ours": ("forward",)}
                row: dict[str, Any] = {"size": size, "batch": batch}
                row |= {"allocator": allocator, "operation": operation}
                self.results["timings"].append(row | self._interleave(sessions, variants, label))
                self.save(self.results)

    def _training_fits(self, memory: dict[str, Any], allocator: str) -> bool:
        peaks = [memory[implementation]["peak"] for implementation in ("reference", "ours")]
        # Under the default allocator the waiting process has given its activations back.
        needed = max(peaks) + 16 * memory["parameters"] if allocator == "default" else sum(peaks)
        return needed < USABLE_MEMORY * machine_memory()

    def _interleave(
        self, sessions: dict[str, Session], variants: dict[str, tuple[str, ...]], label: str
    ) -> dict[str, dict[str, list[float]]]:
        """Seconds of each call after one warm-up each: reference, ours, reference, ours, …"""
        calls = [(name, variant) for name, names in variants.items() for variant in names]
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
        for repeat in range(-1, self.settings.repeats):
            taken = {call: sessions[call[0]].ask("run", operation=call[1])["seconds"] for call in calls}
            line = ", ".join(f"{name} {variant} {value:.2f} s" for (name, variant), value in taken.items())
            turn = "warm-up" if repeat < 0 else f"{repeat + 1}/{self.settings.repeats}"
            self.say(f"{label}, {turn}: {line}")
            if repeat >= 0:
                for (name, variant), value in taken.items():
                    seconds[name].setdefault(variant, []).append(value)
        return seconds

    def _compare(
        self, sessions: dict[str, Session], size: str, batch: str, folder: Path, gradients: bool
    ) -> None:
        """Raises BenchmarkError when the answers differ: then a timing would mean nothing."""
        # Gradients of one batch suffice, and are as large as the network.
        gradients = gradients and batch == self.settings.batches[0]
        paths = {name: folder / f"answers_{name}.pt" for name in sessions}
        for name, session in sessions.items():
            draws = REFERENCE_DRAWS if name == "reference" else 1
            session.ask("answers", path=str(paths[name]), draws=draws, gradients=gradients)
        try:
            rows = compare_answers(paths["ours"], paths["reference"])
        except ValueError as error:
            raise BenchmarkError(f"{size} {batch}: {error}") from error
        for row in rows:
            self.say(
                f"{size} {batch} {row.quantity}: differs by {row.difference:.1e} (allowed"
                f" {row.tolerance:.1e}, the reference's own scatter {row.scatter:.1e}, rms {row.rms:.1e})"
            )
            self.results["answers"].append({"size": size, "batch": batch} | asdict(row))
        wrong = [row.quantity for row in rows if not row.agrees]
        if wrong:
            raise BenchmarkError(f"{size} {batch}: answers differ in {', '.join(wrong)}; nothing was timed")

    def _leave_out(self, reason: str) -> None:
        self.say(f"left out: {reason}")
        self.results["left_out"].append(reason)


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

"""A worker that needs no network: it answers at once, with times and sizes that are known."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.benchmark_context import Benchmark
from benchmarks.benchmark_results import Store
from benchmarks.benchmark_settings import Settings
from benchmarks.compare_fairchem import measure_all
from benchmarks.worker_session import BenchmarkError, RefusedError

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when a kernel is defined

GIB = 2**30
SECONDS = {
    ("reference", "forward"): 3.0,
    ("reference", "forward_as_shipped"): 2.8,
    ("reference", "training_step"): 8.0,
    ("reference", "relaxation_step"): 4.0,
    ("ours", "forward"): 1.4,
    ("ours", "training_step"): 8.0,
    ("ours", "relaxation_step"): 1.0,
}
MACHINE = {"processor": "a", "cores": 2, "memory_gib": 24.0, "system": "b", "load_average_before": 0.1}
# Answers in bf16 are larger than the others by this share.
DEVIATION = 0.001


class FakeSession:
    """Its training step takes 0.1 GiB (half of that in ours) per atom; bf16 is twice as fast.

    The backend `compile` is refused. Of a supercell a forward takes 10 ms (reference) or 1 ms per atom, and
    1 MiB per atom.
    """

    log: list[tuple[str, dict[str, Any]]]

    def __init__(self, implementation: str, log: list[tuple[str, dict[str, Any]]]) -> None:
        self.implementation, self.log = implementation, log
        self.atoms, self.supercell = 0, False

    def __enter__(self) -> "FakeSession":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.log.append((self.implementation, {"command": command, **arguments}))
        if arguments.get("backend", "auto") == "compile":
            raise RefusedError("no such backend")
        answer: Callable[..., dict[str, Any]] = getattr(self, f"_{command}")
        return answer(**arguments)

    def _describe(self) -> dict[str, Any]:
        return {"name": self.implementation, "version": "1", "torch": "2", "python": "3", "device": "cpu"}

    def _build(self, batch: str, **_: Any) -> dict[str, Any]:
        self.supercell = batch.startswith("atoms-")
        known = {"B1": 73, "B4": 300, "OC20": 195}
        self.atoms = int(batch.removeprefix("atoms-")) if self.supercell else known[batch]
        return {"parameters": 1000, "atoms": self.atoms, "peak": GIB}

    def _load(self, checkpoint: str, batch: str) -> dict[str, Any]:
        assert Path(checkpoint).exists()
        return self._build(batch)

    def _answers(self, path: str, draws: int, precision: str = "float32", **_: Any) -> dict[str, Any]:
        factor = 1 + DEVIATION if precision == "bf16" else 1.0
        draw = {"energy": torch.full((2,), factor), "forces": torch.full((2, 3), factor)}
        edges = {"edge_index": torch.tensor([[0, 1], [1, 0]]), "vectors": torch.ones(2, 3)}
        torch.save({**edges, "draws": [draw] * draws}, path)
        return {"edges": 20 * self.atoms}

    def _begin_relaxation(self, **arguments: Any) -> dict[str, Any]:
        self._answers(**arguments)
        return {"atoms": 73}

    def _run(self, operation: str, precision: str = "float32", **_: Any) -> dict[str, Any]:
        if self.supercell:
            return {"seconds": self.atoms * (0.01 if self.implementation == "reference" else 0.001)}
        seconds = SECONDS[self.implementation, operation]
        return {"seconds": seconds / 2 if precision == "bf16" else seconds}

    def _memory(self) -> dict[str, Any]:
        if self.supercell:
            if self.implementation == "reference" and self.atoms > 1000:
                raise BenchmarkError("the reference process was killed")
            return {"before_model": GIB // 2, "peak": GIB + self.atoms * 2**20}
        per_atom = 0.1 if self.implementation == "reference" else 0.05
        return {"before_model": GIB // 2, "peak": int(GIB * (1 + per_atom * self.atoms))}

    def _count(self) -> dict[str, Any]:
        parts = {"SO(2) GEMMs 1": [1e9, 1e8], "norm": [0.0, 1e7]}
        return {"edges": 20 * self.atoms, "parts": parts}

    def _gemm_rate(self, precision: str, repeats: int) -> dict[str, Any]:
        return {"rate": 4e9 if precision == "bf16" else 2e9, "best": 5e9, "shapes": [[1, 2, 3]]}

    def _bandwidth(self, repeats: int) -> dict[str, Any]:
        return {"copy": 4e8, "triad": 5e8, "rate": 5e8, "array_bytes": 2**28}

    def _breakdown(self, operation: str, precision: str) -> dict[str, Any]:
        backward = 1.5 if operation == "training_step" else 0.0
        return {"parts": {"SO(2) GEMMs 1": [1.0, backward], "norm": [0.25, 0.0]}, "total": 1.25 + backward}


@dataclass(frozen=True)
class FakeSettings(Settings):
    """Settings whose sessions are `FakeSession`s; `log` is what was asked of all of them."""

    log: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def session(self, implementation: str, *_: Any) -> Any:
        return FakeSession(implementation, self.log)


@pytest.fixture
def log() -> list[tuple[str, dict[str, Any]]]:
    """List that records the requests to the sessions of settings that were made with it."""
    return []


def make_settings(**changes: Any) -> FakeSettings:
    """Everything at its default but 31M alone and three repeats."""
    values: dict[str, Any] = {
        "ours_python": "python",
        "reference_python": "python",
        "parts": ("memory", "timings"),
        "sizes": ("31M",),
        "batches": ("B1", "B4"),
        "allocators": ("default",),
        "precisions": ("float32",),
        "backends": ("auto",),
        "device": "cpu",
        "repeats": 3,
        "threads": 2,
        "atoms": (16, 150, 1200),
        "max_seconds": 100.0,
    }
    return FakeSettings(**(values | changes))


def make_store(folder: Path, force: bool = False, **machine: Any) -> Store:
    run = {"command": "python scripts/benchmark.py", "machine": MACHINE | machine}
    return Store(folder / "benchmark_cpu.json", run, force)


def run_all(store: Store, folder: Path, **changes: Any) -> None:
    """All parts on a machine with 24 GiB, with `FakeSession`s."""
    settings = make_settings(**changes)
    measure_all(Benchmark(settings, store, folder, lambda: None, lambda line: None, memory=24 * GIB))


def measured(folder: Path, **changes: Any) -> dict[str, Any]:
    """The content of the store after a benchmark with `FakeSession`s."""
    store = make_store(folder)
    run_all(store, folder, **changes)
    return store.content

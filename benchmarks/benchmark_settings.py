"""Settings of one run of the benchmark: sizes, operations, precisions, repetitions."""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.worker_session import Session

# What these parts tell is about equiformer2 alone, so they run without the reference's environment.
PARTS_WITHOUT_REFERENCE = ("precision", "breakdown", "atoms", "training_atoms")
DEVICES = ("cpu", "cuda")
BACKENDS = ("auto", "torch", "cpp", "compile", "triton")


@dataclass(frozen=True)
class Variant:
    """One way to run equiformer2's network."""

    precision: str = "float32"
    backend: str = "auto"

    @property
    def label(self) -> str:
        return self.precision if self.backend == "auto" else f"{self.precision}, {self.backend}"

    @property
    def plain(self) -> bool:
        """Whether it is the one that the others are compared with."""
        return self == Variant()


@dataclass(frozen=True)
class Call:
    """One thing to time."""

    implementation: str
    operation: str
    precision: str = "float32"
    backend: str = "auto"

    @property
    def label(self) -> str:
        return f"{self.implementation} {self.operation} {Variant(self.precision, self.backend).label}"

    @property
    def request(self) -> dict[str, str]:
        """Return the settings that are sent to the worker."""
        return {key: value for key, value in asdict(self).items() if key != "implementation"}


@dataclass(frozen=True)
class Settings:
    """One benchmark: which Pythons, what to measure and how often.

    `reference_python` is None where there is no environment of the reference. `atoms` are the wanted numbers
    of atoms of the parts of that name, `max_seconds` the longest call that it makes on purpose.
    """

    ours_python: str
    reference_python: str | None
    parts: tuple[str, ...]
    sizes: tuple[str, ...]
    batches: tuple[str, ...]
    allocators: tuple[str, ...]
    precisions: tuple[str, ...]
    backends: tuple[str, ...]
    device: str
    repeats: int
    threads: int
    atoms: tuple[int, ...]
    max_seconds: float

    def session(self, implementation: str, allocator: str, memory_limit: int | None = None) -> Session:
        python = self.ours_python if implementation == "ours" else self.reference_python
        assert python is not None
        return Session(implementation, python, self.threads, allocator, self.device, memory_limit)

    def variants(self) -> list[Variant]:
        """Return the settings of equiformer2: every backend in every precision."""
        return [Variant(precision, backend) for backend in self.backends for precision in self.precisions]

    def reference_precisions(self) -> tuple[str, ...]:
        """The reference keeps float32 tensors; TF32 changes its matrix products only."""
        return tuple(p for p in self.precisions if p != "bf16") or ("float32",)

    def of_unit(self, *names: str) -> dict[str, Any]:
        """The settings that decide whether a measurement would be the same one again."""
        common = {"device": self.device, "threads": self.threads}
        return common | {name: _plain(getattr(self, name)) for name in names}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

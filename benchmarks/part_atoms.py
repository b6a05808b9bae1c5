"""Time and peak memory against the number of atoms, every point in a process of its own."""

import math
import statistics
from typing import Any

from benchmarks.answer_comparison import compare_answers
from benchmarks.benchmark_context import REFERENCE_DRAWS, Benchmark
from benchmarks.benchmark_structures import supercell_atoms
from benchmarks.worker_session import BenchmarkError

# A call that takes longer than this is timed once: its spread is small beside what it shows.
ONCE_FROM_SECONDS = 30.0


def measure(bench: Benchmark, size: str) -> None:
    """Inference, and whether the smallest structure's answers agree."""
    wanted = _measure_all(bench, size, "atoms", "forward")
    if bench.settings.reference_python is not None and wanted:
        bench.unit(
            f"answers/atoms/{size}",
            bench.settings.of_unit(),
            lambda: _compare(bench, size, wanted[0]),
        )


def measure_training(bench: Benchmark, size: str) -> None:
    """Training steps."""
    _measure_all(bench, size, "training_atoms", "training_step")


def _measure_all(bench: Benchmark, size: str, part: str, operation: str) -> list[int]:
    """Returns the numbers of atoms."""
    settings = bench.settings
    wanted = sorted({supercell_atoms(atoms) for atoms in settings.atoms})
    implementations = ["ours"] if settings.reference_python is None else ["reference", "ours"]
    for implementation in implementations:
        points: list[dict[str, Any]] = []
        for atoms in wanted:

            def fresh(
                atoms: int = atoms, name: str = implementation, smaller: list[dict[str, Any]] = points
            ) -> dict[str, Any]:
                return _measure(bench, size, name, operation, atoms, smaller)

            key = settings.of_unit("repeats", "max_seconds")
            point = bench.unit(f"{part}/{size}/{implementation}/{atoms}", key, fresh)
            if "seconds" not in point:
                break  # larger ones would not fit either
            points.append(point)
    return wanted


def _measure(
    bench: Benchmark,
    size: str,
    implementation: str,
    operation: str,
    atoms: int,
    smaller: list[dict[str, Any]],
) -> dict[str, Any]:
    record: dict[str, Any] = {"size": size, "implementation": implementation, "atoms": atoms}
    label = f"{size} {implementation} {operation} {atoms} atoms"
    limit = bench.settings.max_seconds
    expected = extrapolate([(point["atoms"], min(point["seconds"])) for point in smaller], atoms)
    if expected > limit:
        bench.leave_out(record, f"{label}: a call would take about {expected:.0f} s, more than {limit:.0f} s")
        return record
    memory_limit = None if math.isinf(bench.usable_memory) else int(bench.usable_memory)
    bench.parameters(size)
    try:
        with bench.settings.session(implementation, "default", memory_limit) as session:
            record["implementations"] = {implementation: session.ask("describe")}
            built = bench.build(session, size, f"atoms-{atoms}")
            warm_up = session.ask("run", operation=operation)["seconds"]
            repeats = 1 if warm_up > ONCE_FROM_SECONDS else bench.settings.repeats
            seconds = [session.ask("run", operation=operation)["seconds"] for _ in range(repeats)]
            record |= session.ask("memory") | {"built": built["peak"], "seconds": seconds}
    except BenchmarkError as error:
        bench.leave_out(record, f"{label}: {error}")
        return record
    bench.say(f"{label}: {statistics.median(seconds):.3g} s, peak {record['peak'] / 2**30:.2f} GiB")
    return record


def _compare(bench: Benchmark, size: str, atoms: int) -> dict[str, Any]:
    """The smallest structure's answers."""
    paths = {}
    for name, draws in (("reference", REFERENCE_DRAWS), ("ours", 1)):
        with bench.settings.session(name, "default") as session:
            bench.build(session, size, f"atoms-{atoms}")
            paths[name] = bench.folder / f"atoms_{name}.pt"
            session.ask("answers", path=str(paths[name]), draws=draws, gradients=False)
    try:
        rows = compare_answers(paths["ours"], paths["reference"])
    except ValueError as error:
        raise BenchmarkError(f"{size} {atoms} atoms: {error}") from error
    found = bench.judge(f"{size} {atoms} atoms", rows)
    return {
        "size": size,
        "batch": f"{atoms} atoms",
        "answers": [{"variant": "float32"} | row for row in found],
    }


def extrapolate(points: list[tuple[int, float]], atoms: int) -> float:
    """Expected value at `atoms`, by the power law of the last two points and at least in proportion."""
    if not points:
        return 0.0
    last_atoms, last = points[-1]
    exponent = 1.0
    if len(points) > 1 and last > points[-2][1]:
        before_atoms, before = points[-2]
        exponent = max(1.0, math.log(last / before) / math.log(last_atoms / before_atoms))
    return last * (atoms / last_atoms) ** exponent

"""Peak memory of two training steps, each implementation in a fresh process."""

from typing import Any

from benchmarks.benchmark_context import USABLE_MEMORY, Benchmark, machine_memory
from benchmarks.benchmark_structures import BATCHES
from benchmarks.worker_session import RefusedError

IMPLEMENTATIONS = ("reference", "ours")


def measure(bench: Benchmark, size: str) -> None:
    settings = bench.settings
    stored = (bench.store.find(f"memory/{size}/{batch}") for batch in BATCHES)
    known = [record for record in stored if record is not None and record["peaks"]]
    for batch in settings.batches:

        def fresh(batch: str = batch) -> dict[str, Any]:
            return _measure(bench, size, batch, known)

        known.append(bench.unit(f"memory/{size}/{batch}", settings.of_unit("backends"), fresh))


def _measure(bench: Benchmark, size: str, batch: str, known: list[dict[str, Any]]) -> dict[str, Any]:
    """Two steps, because the optimizer's state exists only from the end of the first."""
    record: dict[str, Any] = {"size": size, "batch": batch, "peaks": [], "implementations": {}}
    for implementation in IMPLEMENTATIONS:
        for backend in ("auto",) if implementation == "reference" else bench.settings.backends:
            label = f"{size} {batch} memory of a training step, {implementation} {backend}"
            bench.say(label)
            with bench.settings.session(implementation, "default") as session:
                record["implementations"][implementation] = session.ask("describe")
                built = bench.build(session, size, batch)
                record |= {"atoms": built["atoms"], "parameters": built["parameters"]}
                need = expected_peak(known, implementation, backend, built)
                if bench.settings.device == "cpu" and need > USABLE_MEMORY * machine_memory():
                    bench.leave_out(record, f"{label}: would need about {need / 2**30:.0f} GiB")
                    continue
                try:
                    for _ in range(2):
                        session.ask("run", operation="training_step", backend=backend)
                except RefusedError as error:
                    # On a GPU there is no other way to know; on a CPU a backend may not be there.
                    bench.leave_out(record, f"{label}: {error}")
                    continue
                peak = {"implementation": implementation, "backend": backend, "built": built["peak"]}
                record["peaks"].append(peak | session.ask("memory"))
    return record


def expected_peak(
    known: list[dict[str, Any]], implementation: str, backend: str, built: dict[str, Any]
) -> float:
    """From what a smaller batch took: activations grow with the number of atoms."""
    for record in known:
        peak = peak_of(record, implementation, backend)
        if peak is not None:
            return built["peak"] + (peak["peak"] - peak["built"]) * built["atoms"] / record["atoms"]
    return 0.0


def peak_of(record: dict[str, Any], implementation: str, backend: str = "auto") -> dict[str, Any] | None:
    """The peaks of one implementation in a record, if it was measured."""
    for peak in record["peaks"]:
        if (peak["implementation"], peak["backend"]) == (implementation, backend):
            return peak
    return None

"""Measurements of the benchmark on its batches: memory, timings, relaxation, precision, breakdown.

Each `measure_*` function measures one part for a network size and skips what is complete in the results file.
"""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.answer_comparison import compare_answers, compare_outputs, deviation
from benchmarks.benchmark_context import REFERENCE_DRAWS, Benchmark
from benchmarks.benchmark_results import peak_of
from benchmarks.benchmark_settings import Call, Variant
from benchmarks.benchmark_structures import BATCHES, ROOT
from benchmarks.network_sizes import SIZES
from benchmarks.worker_session import BenchmarkError, RefusedError, Session

OPERATIONS = ("forward", "training_step")
RELAXED_BATCH = "B1"
# The size whose trained network is shipped is measured with that network.
TRAINED = {"small": ROOT / "models" / "oc20_small.pt"}


def measure_memory(bench: Benchmark, size: str) -> None:
    settings = bench.settings
    stored = (bench.store.find(f"memory/{size}/{batch}") for batch in BATCHES)
    known = [record for record in stored if record is not None and record["peaks"]]
    for batch in settings.batches:

        def fresh(batch: str = batch) -> dict[str, Any]:
            return _measure_memory(bench, size, batch, known)

        known.append(bench.unit(f"memory/{size}/{batch}", settings.of_unit("backends"), fresh))


def _measure_memory(bench: Benchmark, size: str, batch: str, known: list[dict[str, Any]]) -> dict[str, Any]:
    """Two steps, because the optimizer's state exists only from the end of the first."""
    record: dict[str, Any] = {"size": size, "batch": batch, "peaks": [], "implementations": {}}
    for implementation in ("reference", "ours"):
        for backend in ("auto",) if implementation == "reference" else bench.settings.backends:
            label = f"{size} {batch} memory of a training step, {implementation} {backend}"
            bench.say(label)
            with bench.settings.session(implementation, "default") as session:
                record["implementations"][implementation] = session.ask("describe")
                built = bench.build(session, size, batch)
                record |= {"atoms": built["atoms"], "parameters": built["parameters"]}
                need = expected_peak(known, implementation, backend, built)
                if need > bench.usable_memory:
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


def measure_timings(bench: Benchmark, size: str) -> None:
    settings = bench.settings
    if any(bench.store.find(f"memory/{size}/{batch}") is None for batch in settings.batches):
        # What does not fit would end the machine's patience, or that of its other users.
        measure_memory(bench, size)
    for batch in settings.batches:
        for allocator in settings.allocators:

            def fresh(batch: str = batch, allocator: str = allocator) -> dict[str, Any]:
                return _measure_timings(bench, size, batch, allocator)

            key = settings.of_unit("repeats", "precisions", "backends")
            bench.unit(f"timings/{size}/{batch}/{allocator}", key, fresh)


def _measure_timings(bench: Benchmark, size: str, batch: str, allocator: str) -> dict[str, Any]:
    record: dict[str, Any] = {"size": size, "batch": batch, "allocator": allocator}
    record["structures"] = len(BATCHES[batch])
    training = _training_fits(bench, size, batch, allocator)
    label = f"{size} {batch}"
    with (
        bench.settings.session("reference", allocator) as reference,
        bench.settings.session("ours", allocator) as ours,
    ):
        sessions = {"reference": reference, "ours": ours}
        record["implementations"] = {name: session.ask("describe") for name, session in sessions.items()}
        for session in sessions.values():
            bench.build(session, size, batch)
        # Gradients of one batch suffice, and are as large as the network.
        gradients = training and batch == bench.settings.batches[0]
        variants = compare(bench, sessions, record, label, gradients)
        record["calls"] = []
        for operation in OPERATIONS:
            if operation == "training_step" and not training:
                bench.leave_out(record, f"{label} training step, {allocator} allocator: not enough memory")
                continue
            calls = list_calls(bench, operation, variants, as_shipped=training)
            if operation == "forward" and not training:
                # As shipped, the reference's forward takes the memory of a training step.
                reason = (
                    f"{label} forward, {allocator} allocator, fairchem-core as shipped: not enough memory"
                )
                bench.leave_out(record, reason)
            record["calls"] += bench.interleave(sessions, calls, label, bench.settings.repeats)
    return record


def list_calls(bench: Benchmark, operation: str, variants: list[Variant], as_shipped: bool) -> list[Call]:
    """List the calls that are timed for one operation, in their sequence."""
    calls = []
    for precision in bench.settings.reference_precisions():
        calls.append(Call("reference", operation, precision))
        if operation == "forward" and as_shipped:
            # Inference as users should run it, and as its own code runs it inside `no_grad`.
            calls.append(Call("reference", "forward_as_shipped", precision))
    for variant in variants:
        # bf16 on a CPU is an inference mode.
        if operation == "forward" or variant.precision != "bf16" or bench.settings.device == "cuda":
            calls.append(Call("ours", operation, variant.precision, variant.backend))
    return calls


def compare(
    bench: Benchmark, sessions: dict[str, Session], record: dict[str, Any], label: str, gradients: bool
) -> list[Variant]:
    """Compare float32 answers with the reference's, the other precisions with float32; who can be timed?

    Raises:
        BenchmarkError: float32 answers differ.
    """
    path = bench.folder / "reference_answers.pt"
    sessions["reference"].ask("answers", path=str(path), draws=REFERENCE_DRAWS, gradients=gradients)
    record["answers"], record["deviations"] = [], []
    plain = bench.folder / "plain_answers.pt"
    sessions["ours"].ask("answers", path=str(plain), draws=1, gradients=gradients)
    usable = []
    for variant in bench.settings.variants():
        own = bench.folder / "answers.pt"
        exact = variant.precision == "float32"
        request = {"precision": variant.precision, "backend": variant.backend}
        try:
            sessions["ours"].ask("answers", path=str(own), draws=1, gradients=gradients and exact, **request)
        except RefusedError as error:
            if variant.plain:
                raise
            bench.leave_out(record, f"{label} equiformer2 {variant.label}: {error}")
            continue
        if exact:
            try:
                rows = compare_answers(own, path)
            except ValueError as error:
                raise BenchmarkError(f"{label}: {error}") from error
            found = bench.judge(f"{label} {variant.label}", rows)
            record["answers"] += [{"variant": variant.label} | row for row in found]
        if not variant.plain:
            record["deviations"].append(request | {"variant": variant.label} | deviation(own, plain))
        usable.append(variant)
    return usable


def _training_fits(bench: Benchmark, size: str, batch: str, allocator: str) -> bool:
    """By the memory part's record of this size and batch."""
    memory = bench.store.find(f"memory/{size}/{batch}")
    assert memory is not None
    peaks = [peak_of(memory, implementation) for implementation in ("reference", "ours")]
    measured = [peak["peak"] for peak in peaks if peak is not None]
    if len(measured) < len(peaks):
        return False
    # Under the default allocator the waiting process has given its activations back.
    needed = max(measured) + 16 * memory["parameters"] if allocator == "default" else sum(measured)
    return needed < bench.usable_memory


def measure_relaxation(bench: Benchmark, size: str) -> None:
    settings = bench.settings

    def fresh() -> dict[str, Any]:
        return _measure_relaxation(bench, size)

    bench.unit(f"relaxation/{size}", settings.of_unit("repeats", "precisions", "backends"), fresh)


def _measure_relaxation(bench: Benchmark, size: str) -> dict[str, Any]:
    record: dict[str, Any] = {"size": size, "answers": [], "deviations": []}
    label = f"{size} relaxation"
    with (
        bench.settings.session("reference", "default") as reference,
        bench.settings.session("ours", "default") as ours,
    ):
        sessions = {"reference": reference, "ours": ours}
        record["implementations"] = {name: session.ask("describe") for name, session in sessions.items()}
        for session in sessions.values():
            bench.build(session, size, RELAXED_BATCH)
        calls = []
        for precision in bench.settings.reference_precisions():
            path = bench.folder / f"reference_{precision}.pt"
            draws = REFERENCE_DRAWS if precision == "float32" else 1
            _begin(reference, str(path), draws, Variant(precision))
            calls.append(Call("reference", "relaxation_step", precision))
        plain = bench.folder / "plain.pt"
        record |= _begin(ours, str(plain), 1, Variant())
        for variant in bench.settings.variants():
            path = plain if variant.plain else bench.folder / "variant.pt"
            try:
                if not variant.plain:
                    _begin(ours, str(path), 1, variant)
            except RefusedError as error:
                bench.leave_out(record, f"{label}, equiformer2 {variant.label}: {error}")
                continue
            if variant.precision == "float32":
                rows = compare_outputs(path, bench.folder / "reference_float32.pt")
                found = bench.judge(f"{label} {variant.label}, start structure", rows)
                record["answers"] += [{"variant": variant.label} | row for row in found]
            if not variant.plain:
                record["deviations"].append({"variant": variant.label} | deviation(path, plain))
            calls.append(Call("ours", "relaxation_step", variant.precision, variant.backend))
        record["calls"] = bench.interleave(sessions, calls, label, bench.settings.repeats)
    return record


def _begin(session: Session, path: str, draws: int, variant: Variant) -> dict[str, Any]:
    request = {"precision": variant.precision, "backend": variant.backend}
    return session.ask("begin_relaxation", path=path, draws=draws, **request)


def measure_precision(bench: Benchmark, size: str) -> None:
    settings = bench.settings

    def fresh() -> dict[str, Any]:
        return _measure_precision(bench, size)

    bench.unit(f"precision/{size}", settings.of_unit("precisions", "backends"), fresh)


def _measure_precision(bench: Benchmark, size: str) -> dict[str, Any]:
    trained = TRAINED.get(size)
    record: dict[str, Any] = {"size": size, "trained": trained is not None, "deviations": []}
    with bench.settings.session("ours", "default") as session:
        record["implementations"] = {"ours": session.ask("describe")}
        if trained is None:
            seeded = {"config": SIZES[size], "parameters": None, "create": False}
            record["atoms"] = session.ask("build", batch="OC20", **seeded)["atoms"]
        else:
            record["atoms"] = session.ask("load", checkpoint=str(trained), batch="OC20")["atoms"]
        plain = bench.folder / "plain.pt"
        session.ask("answers", path=str(plain), draws=1, gradients=False)
        for variant in bench.settings.variants():
            if not variant.plain:
                _variant(bench, session, record, variant, plain)
    return record


def _variant(bench: Benchmark, session: Any, record: dict[str, Any], variant: Variant, plain: Path) -> None:
    request = {"precision": variant.precision, "backend": variant.backend}
    path = bench.folder / "variant.pt"
    try:
        session.ask("answers", path=str(path), draws=1, gradients=False, **request)
    except RefusedError as error:
        bench.leave_out(record, f"{record['size']} precision, {variant.label}: {error}")
        return
    found = deviation(path, plain)
    bench.say(
        f"{record['size']} {variant.label}: relative rms deviation of energies {found['energy']:.1e}, "
        f"of forces {found['forces']:.1e}"
    )
    record["deviations"].append(request | {"variant": variant.label} | found)


def measure_breakdown(bench: Benchmark, size: str) -> None:
    settings = bench.settings
    for batch in settings.batches:

        def fresh(batch: str = batch) -> dict[str, Any]:
            return _measure_breakdown(bench, size, batch)

        bench.unit(f"breakdown/{size}/{batch}", settings.of_unit("repeats", "precisions"), fresh)


def _measure_breakdown(bench: Benchmark, size: str, batch: str) -> dict[str, Any]:
    record: dict[str, Any] = {"size": size, "batch": batch, "rates": {}, "calls": []}
    precisions = bench.settings.precisions
    # The rate of bf16 products belongs to the report, whether or not the network is timed in bf16.
    with bench.settings.session("ours", "default") as session:
        record["implementations"] = {"ours": session.ask("describe")}
        seeded = {"config": SIZES[size], "parameters": None, "create": False}
        record["atoms"] = session.ask("build", batch=batch, **seeded)["atoms"]
        record |= session.ask("count")
        for precision in dict.fromkeys((*precisions, "bf16")):
            rate = session.ask("gemm_rate", precision=precision, repeats=bench.settings.repeats)
            record["rates"][precision] = rate
            bench.say(f"{size} {batch} {precision} matrix products: {rate['rate'] / 1e9:.0f} GFLOP/s")
        record["bandwidth"] = session.ask("bandwidth", repeats=bench.settings.repeats)
        bench.say(f"{size} {batch} memory: {record['bandwidth']['rate'] / 1e9:.1f} GB/s")
        for operation in OPERATIONS:
            for precision in precisions:
                if operation == "training_step" and precision == "bf16" and bench.settings.device == "cpu":
                    continue
                call: dict[str, Any] = {"operation": operation, "precision": precision}
                call["breakdown"] = session.ask("breakdown", operation=operation, precision=precision)
                call["seconds"] = [
                    session.ask("run", operation=operation, precision=precision)["seconds"]
                    for _ in range(bench.settings.repeats)
                ]
                bench.say(
                    f"{size} {batch} {operation} {precision}: {statistics.median(call['seconds']):.3g} s, "
                    f"under the profiler {call['breakdown']['total']:.3g} s"
                )
                record["calls"].append(call)
    return record

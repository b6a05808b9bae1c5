"""Forward and training step, timed in turn, after the answers were compared."""

from typing import Any

from benchmarks import part_memory
from benchmarks.answer_comparison import compare_answers, deviation
from benchmarks.benchmark_context import REFERENCE_DRAWS, USABLE_MEMORY, Benchmark, machine_memory
from benchmarks.benchmark_settings import Call, Variant
from benchmarks.benchmark_structures import BATCHES
from benchmarks.part_memory import peak_of
from benchmarks.worker_session import BenchmarkError, RefusedError, Session

OPERATIONS = ("forward", "training_step")


def measure(bench: Benchmark, size: str) -> None:
    settings = bench.settings
    if any(bench.store.find(f"memory/{size}/{batch}") is None for batch in settings.batches):
        # What does not fit would end the machine's patience, or that of its other users.
        part_memory.measure(bench, size)
    for batch in settings.batches:
        for allocator in settings.allocators:

            def fresh(batch: str = batch, allocator: str = allocator) -> dict[str, Any]:
                return _measure(bench, size, batch, allocator)

            key = settings.of_unit("repeats", "precisions", "backends")
            bench.unit(f"timings/{size}/{batch}/{allocator}", key, fresh)


def _measure(bench: Benchmark, size: str, batch: str, allocator: str) -> dict[str, Any]:
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
    """What is timed for one operation, in the sequence of the calls."""
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
    if bench.settings.device == "cuda":
        return True
    # Under the default allocator the waiting process has given its activations back.
    needed = max(measured) + 16 * memory["parameters"] if allocator == "default" else sum(measured)
    return needed < USABLE_MEMORY * machine_memory()

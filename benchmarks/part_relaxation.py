"""Seconds per relaxation step through an ASE calculator, first forces compared."""

from typing import Any

from benchmarks.answer_comparison import compare_outputs, deviation
from benchmarks.benchmark_context import REFERENCE_DRAWS, Benchmark
from benchmarks.benchmark_settings import Call, Variant
from benchmarks.worker_session import RefusedError, Session

BATCH = "B1"


def measure(bench: Benchmark, size: str) -> None:
    settings = bench.settings

    def fresh() -> dict[str, Any]:
        return _measure(bench, size)

    bench.unit(f"relaxation/{size}", settings.of_unit("repeats", "precisions", "backends"), fresh)


def _measure(bench: Benchmark, size: str) -> dict[str, Any]:
    record: dict[str, Any] = {"size": size, "answers": [], "deviations": []}
    label = f"{size} relaxation"
    with (
        bench.settings.session("reference", "default") as reference,
        bench.settings.session("ours", "default") as ours,
    ):
        sessions = {"reference": reference, "ours": ours}
        record["implementations"] = {name: session.ask("describe") for name, session in sessions.items()}
        for session in sessions.values():
            bench.build(session, size, BATCH)
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

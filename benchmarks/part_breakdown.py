"""Where the time of ours goes, beside what the machine's matrix products and memory allow."""

import statistics
from typing import Any

from benchmarks.benchmark_context import Benchmark
from benchmarks.network_sizes import SIZES

OPERATIONS = ("forward", "training_step")


def measure(bench: Benchmark, size: str) -> None:
    settings = bench.settings
    for batch in settings.batches:

        def fresh(batch: str = batch) -> dict[str, Any]:
            return _measure(bench, size, batch)

        bench.unit(f"breakdown/{size}/{batch}", settings.of_unit("repeats", "precisions"), fresh)


def _measure(bench: Benchmark, size: str, batch: str) -> dict[str, Any]:
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

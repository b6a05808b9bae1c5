"""How far lower precisions and other backends move the answers on real OC20 structures; ours alone."""

from pathlib import Path
from typing import Any

from benchmarks.answer_comparison import deviation
from benchmarks.benchmark_context import Benchmark
from benchmarks.benchmark_settings import Variant
from benchmarks.benchmark_structures import ROOT
from benchmarks.network_sizes import SIZES
from benchmarks.worker_session import RefusedError

# The size whose trained network is shipped is measured with that network.
TRAINED = {"small": ROOT / "models" / "oc20_small.pt"}


def measure(bench: Benchmark, size: str) -> None:
    settings = bench.settings

    def fresh() -> dict[str, Any]:
        return _measure(bench, size)

    bench.unit(f"precision/{size}", settings.of_unit("precisions", "backends"), fresh)


def _measure(bench: Benchmark, size: str) -> dict[str, Any]:
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

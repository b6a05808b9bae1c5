"""Time of the searches for a plan and for a router of a large network, on structures of a data set.

    python -m studies.study_data       # writes runs/data/study/train.lmdb
    python -m studies.search_time      # a 31M network, up to an hour on two cores with nothing beside it

Each search is what `equiformer2 prune plan` and `equiformer2 prune route` do with their defaults, at 70 % of
the operations. The network has random weights: its plans are of no use, their work and time are those of a
trained one of this size. A search that is stopped begins again, so that its time is of one piece; a search
that the page holds is not repeated.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from equiformer2.checkpoint import save_checkpoint
from equiformer2.errors import InputError
from equiformer2.pruning.calibration_data import read_structures
from equiformer2.pruning.fingerprints import fingerprint_of_structures
from equiformer2.pruning.routing.route_request import RouteRequest, make_router
from equiformer2.pruning.structured.plan_request import PlanRequest, make_plan
from equiformer2.script import run_script
from studies.random_networks import SIZES, random_checkpoint
from studies.results import Results, Row, write_page

DATA = Path("runs/data/study/train.lmdb")
KEEP = 0.7
_COLUMNS = (
    *("search", "network", "structures (mean atoms)", "candidates", "passes", "minutes", "threads"),
    "MACs left",
)


def time_plan(checkpoint: Path, data: Path, structures: int) -> Row:
    """Search a plan as `equiformer2 prune plan` does."""
    found = make_plan(PlanRequest(str(checkpoint), (str(data),), (f"macs={KEEP}",), structures=structures))
    tried = int(found.search["tried"])
    return {"passes": found.search["passes"], "candidates": tried, "macs": found.macs, "errors": found.errors}


def time_router(checkpoint: Path, data: Path, structures: int) -> Row:
    """Search a static router as `equiformer2 prune route` does."""
    found = make_router(
        RouteRequest(str(checkpoint), (str(data),), "static", f"macs={KEEP}", structures=structures)
    )
    schedule = found.search["schedule"]
    return {
        "passes": schedule["passes"],
        "candidates": schedule["evaluations"],
        "macs": found.shares.macs,
        "errors": found.errors,
    }


SEARCHES: dict[str, Callable[[Path, Path, int], Row]] = {"plan": time_plan, "route": time_router}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="31M", help="network's size")
    parser.add_argument("--data", type=Path, default=DATA, help="LMDB file (default: %(default)s)")
    parser.add_argument("--structures", type=int, default=32, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--out", type=Path, default=Path("runs/search_time"), help="folder of the results")
    parser.add_argument("--results", type=Path, default=Path("docs/results/search_time"))
    options = parser.parse_args(words)
    if not options.data.exists():
        raise InputError(
            f"{options.data} is missing: run `python -m studies.study_data` first, or give --data"
        )
    chosen = read_structures(options.data, options.structures)
    setting = {
        "structures": len(chosen),
        "fingerprint": fingerprint_of_structures(chosen),
        "atoms": statistics.fmean(len(data.pos) for data in chosen),
        "keep": KEEP,
    }

    def about(run: str) -> dict[str, Any] | None:
        search, _, size = run.partition("-")
        return {"search": search, "size": size, **setting} if search in SEARCHES and size else None

    results = Results(options.out, about, options.results)
    for search in tqdm(options.searches, desc="searches", unit="search"):
        run = f"{search}-{options.size}"
        if results.get(run) is not None:
            continue
        checkpoint = options.out / f"{options.size}.pt"
        parameters = write_random(options.size, checkpoint)
        start = time.perf_counter()
        found = SEARCHES[search](checkpoint, options.data, options.structures)
        found |= {"seconds": round(time.perf_counter() - start, 1), "parameters": parameters}
        results.keep(run, {**found, "threads": torch.get_num_threads(), "machine": machine()})
    rows = results.all()
    write_page(options.results, rows, markdown(rows))


def write_random(size: str, path: Path) -> int:
    """Write the checkpoint of `random_checkpoint` unless it is there.

    Returns:
        Number of parameters.
    """
    checkpoint = random_checkpoint(size)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(
            path,
            model=checkpoint.model,
            raw_state=checkpoint.model.state_dict(),
            averaged_state=None,
            normalizers=checkpoint.normalizers,
            energy_kind=checkpoint.energy_kind,
            provenance=checkpoint.provenance,
        )
    return sum(weights.numel() for weights in checkpoint.model.parameters())


def machine() -> dict[str, Any]:
    """Processor and number of its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return {"processor": name, "cores": os.cpu_count()}


def markdown(rows: Sequence[Row]) -> str:
    """Write the page of the given searches."""
    lines = [
        "# Time of the searches for a large network",
        "",
        "Written by `python -m studies.search_time`, which says what is measured. A pass is one of the dense",
        "network over a structure of mean size. The clock runs from reading the checkpoint on.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for row in rows:
        about = row["about"]
        cells = [
            about["search"],
            f"{about['size']} ({row['parameters']:,} parameters)",
            f"{about['structures']} ({about['atoms']:.0f})",
            f"{row['candidates']:,}",
            f"{row['passes']:,.0f}",
            f"{row['seconds'] / 60:.1f}",
            str(row["threads"]),
            f"{row['macs']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    names = sorted({f"{row['machine']['processor']}, {row['machine']['cores']} cores" for row in rows})
    return "\n".join([*lines, "", f"Measured on: {'; '.join(names)}."]) + "\n"


if __name__ == "__main__":
    run_script(main)

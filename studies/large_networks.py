"""Bytes, memory and time of stored precisions and of adapters for the public sizes, with random weights.

    python -m studies.large_networks                # half an hour on two cores with nothing beside it
    python -m studies.large_networks --sizes 31M

Sizes and times do not depend on the values of the weights; errors do, and are not measured here. Every force
call is timed in turns with one of the float32 network, on the first frame of a bundled relaxation. Training
steps are of one such frame; of an adapter the network is frozen. A row that is there is not measured again.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch
from tqdm import tqdm

from equiformer2.adapters import AdapterSettings, attach_adapter
from equiformer2.adapters.scores import prune_adapter
from equiformer2.checkpoint import Checkpoint
from equiformer2.checkpoint.adapter_files import Adapter, Base, write_adapter
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.inference import Predictor
from equiformer2.kernels.linear import multiplies_bfloat16
from equiformer2.model import EquiformerV2
from equiformer2.model.folding import resident_bytes
from equiformer2.pruning.calibration import unlabelled
from equiformer2.pruning.calibration_data import read_structures
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.precision.compact import FileSize, compact_network, write_compact
from equiformer2.pruning.precision.plan import PrecisionPlan
from equiformer2.script import run_script
from studies.peak_memory import training_memory
from studies.random_networks import SIZES, random_checkpoint
from studies.results import Results, Row, write_page

DATA = Path("data/oc20_trajs/random1000100.extxyz.xz")
STORED = ("float32", "bf16", "int8", "int4")
#: Kept share of the adapter's entries by the name of its row.
ADAPTERS = {"adapter": 1.0, "adapter, 80 % removed": 0.2}
TRAINED = ("all weights", *ADAPTERS)
PRODUCTS = "products in bf16"
_RANK = 4
_CALLS = 7
_STEPS = 3


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=["31M", "83M"], help="sizes of the networks"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/large_networks"), help="folder of the rows")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/large_networks"), help="page, without ending"
    )
    options = parser.parse_args(words)
    results = Results(options.runs, about, options.results)
    wanted = [(size, kind, way) for size in options.sizes for kind, ways in WAYS.items() for way in ways]
    size, network = "", None
    for each, kind, way in tqdm(wanted, desc="rows", unit="row"):
        if results.get(run_name(each, kind, way)) is not None:
            continue
        if network is None or size != each:
            size, network = each, random_checkpoint(each)
        results.keep(run_name(each, kind, way), MAKERS[kind](network, way))
    rows = results.all()
    write_page(options.results, rows, markdown(rows))


def run_name(size: str, kind: str, way: str) -> str:
    """Name of a row."""
    return f"{size}-{kind}-{way.replace(',', '').replace(' % ', '_').replace(' ', '_')}"


def about(run: str) -> dict[str, Any] | None:
    """Settings of a row by its name."""
    for size in SIZES:
        for kind, ways in WAYS.items():
            for way in ways:
                if run_name(size, kind, way) == run:
                    return {"size": size, "kind": kind, "way": way, "data": str(DATA), "rank": _RANK}
    return None


def _one() -> Batch:
    return Batch.from_data_list([unlabelled(structure) for structure in read_structures([str(DATA)], 1)])


def stored(checkpoint: Checkpoint, way: str) -> Row:
    """Measure the network with all matrices in one precision, or with its products in bfloat16."""
    dense = Predictor(checkpoint)
    if way == PRODUCTS:
        if not multiplies_bfloat16(dense.device):
            return {"refused": "this processor has no instructions for bfloat16"}
        predictor, size = Predictor(checkpoint, precision="bf16"), None
    else:
        plan = PrecisionPlan.uniform(checkpoint.config, way)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "compact.pt"
            write_compact(path, checkpoint, compact_network(checkpoint.model, plan), plan)
            predictor, size = Predictor(str(path)), path.stat().st_size
    return {"bytes": size, **_compared(predictor, dense), **_whole(checkpoint)}


def adapted(checkpoint: Checkpoint, way: str) -> Row:
    """Measure the network with an adapter of random numbers beside the network alone."""
    # Left factors are zero at first; what they hold changes neither size nor time.
    adapter = _adapter(checkpoint, ADAPTERS[way])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.pt"
        write_adapter(path, adapter)
        size = path.stat().st_size
    predictor = Predictor(checkpoint, adapter=adapter)
    found = {"bytes": size, "trained": adapter.trainable_parameters}
    return {**found, **_compared(predictor, Predictor(checkpoint)), **_whole(checkpoint)}


def _compared(predictor: Predictor, dense: Predictor) -> Row:
    one = _one()
    latency = compare_latency(lambda: predictor.predict(one), lambda: dense.predict(one), _CALLS)
    return {
        "atoms": len(one.pos),
        "latency": latency.to_dict(),
        # After calls, which leave what the network keeps for the next one.
        "resident_bytes": resident_bytes(predictor.model),
        "resident_bytes_dense": resident_bytes(dense.model),
        "threads": torch.get_num_threads(),
    }


def _whole(checkpoint: Checkpoint) -> Row:
    return {
        "bytes_float32": FileSize(checkpoint, checkpoint.model).float32,
        "parameters": sum(weights.numel() for weights in checkpoint.model.parameters()),
    }


def _adapter(checkpoint: Checkpoint, keep: float) -> Adapter:
    model = copy.deepcopy(checkpoint.model)
    settings = AdapterSettings(rank=_RANK, keep=keep, method="random")
    maps = attach_adapter(model, settings, seed=0)
    prune_adapter(maps, settings, [], seed=0)
    factors = {id(parameter) for each in maps.values() for parameter in each.parameters()}
    replaced = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in factors
    }
    base = Base(fingerprint_of_weights(checkpoint.model), "0" * 64, "random.pt", checkpoint.weights)
    return Adapter(
        source="the adapter",
        base=base,
        settings=settings.to_dict(),
        maps=maps,
        replaced=replaced,
        normalizers=checkpoint.normalizers,
        energy_kind=checkpoint.energy_kind,
        provenance=checkpoint.provenance,
    )


def trained(checkpoint: Checkpoint, way: str) -> Row:
    """Measure peak memory and time of a training step of one structure."""
    model: EquiformerV2 = copy.deepcopy(checkpoint.model)
    if way in ADAPTERS:
        settings = AdapterSettings(rank=_RANK, keep=ADAPTERS[way], method="random")
        prune_adapter(attach_adapter(model, settings, seed=0), settings, [], seed=0)
    one = _one()
    found: Row = {"atoms": len(one.pos), **training_memory(model, one), "threads": torch.get_num_threads()}
    seconds = []
    for _ in range(_STEPS):
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        out = model(one)
        (out["energy"].square().sum() + out["forces"].square().sum()).backward()
        seconds.append(time.perf_counter() - begin)
    return {**found, "seconds": statistics.median(seconds)}


WAYS = {"stored": (*STORED, PRODUCTS), "adapted": tuple(ADAPTERS), "trained": TRAINED}
MAKERS: dict[str, Callable[[Checkpoint, str], Row]] = {
    "stored": stored,
    "adapted": adapted,
    "trained": trained,
}


def markdown(rows: Sequence[Row]) -> str:
    """Format the page."""
    lines = [
        "# Large networks with random weights",
        "",
        "Written by `python -m studies.large_networks`, which says what is measured. Shares are of the",
        "float32 network's file, of the memory that it holds after a call, and of the time of its force call",
        "(quartiles of the ratio of neighbouring calls in brackets).",
    ]
    for size in SIZES:
        own = {
            (row["about"]["kind"], row["about"]["way"]): row for row in rows if row["about"]["size"] == size
        }
        if not own:
            continue
        lines += [
            *("", f"## {size}", ""),
            "| network | file | share | memory | force call | share |",
            "|---|---|---|---|---|---|",
        ]
        for (kind, way), row in sorted(own.items(), key=lambda item: _order(*item[0])):
            if kind == "trained":
                continue
            name = f"stored in {way}" if kind == "stored" and way != PRODUCTS else way
            lines.append(f"| {name} | {' | '.join(_cells(row))} |")
        steps = {way: row for (kind, way), row in own.items() if kind == "trained"}
        if not steps:
            continue
        lines += [
            "",
            "| training step | trained parameters | peak memory | of it weights and optimizer | s |",
            "|---|---|---|---|---|",
        ]
        for way in TRAINED:
            if way in steps:
                row = steps[way]
                held = row["weights_bytes"] + row["optimizer_bytes"]
                lines.append(
                    f"| {way} | {row['trained']:,} | {_megabytes(row['peak_bytes'])} | {_megabytes(held)} | "
                    f"{row['seconds']:.2f} |"
                )
    return "\n".join(lines) + "\n"


def _order(kind: str, way: str) -> tuple[int, int]:
    return list(WAYS).index(kind), WAYS[kind].index(way)


def _cells(row: Row) -> list[str]:
    if "refused" in row:
        return ["–", "–", "–", row["refused"], "–"]
    size, latency = row["bytes"], row["latency"]
    file = ["–", "–"] if size is None else [_megabytes(size), f"{size / row['bytes_float32']:.1%}"]
    memory = f"{row['resident_bytes'] / row['resident_bytes_dense']:.0%}"
    spread = f"{latency['ratio']:.2f} ({latency['low']:.2f} to {latency['high']:.2f})"
    return [*file, memory, f"{1e3 * latency['seconds']:,.0f} ms", spread]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_script(main)

"""Peak memory of a training step, with and without recomputing the blocks in the backward pass.

    python -m benchmarks.measure_checkpointing [--sizes 83M] [--batches B1,B4] [--ways …] [--json FILE]

Ways: `stored` keeps every intermediate of the forward pass (what the network does when gradients reach the
edge vectors), `kernels` is the default, whose kernels compute the large tensors per edge again, and
`checkpointed` is task.activation_checkpointing on top of it. Each is measured in a fresh process on the
benchmark's structures: float32, dropout on, AdamW's state there before the step. The peak is that of the
whole process on a CPU of a Linux machine: interpreter, libraries, weights and optimizer included. The
gradients of the last two must have equal bits.

The last lines are the figures: the peak with checkpointing as a share of the peak without. A way that does
not fit into the memory that is free is left out and named; with larger batches that is forecast from what a
smaller one took.
"""

import argparse
import dataclasses
import hashlib
import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from benchmarks.benchmark_results import package_digest
from benchmarks.benchmark_structures import BATCHES, load_batch
from benchmarks.equiformer2_network import build
from benchmarks.machine import describe_machine, limit_memory, peak_memory
from benchmarks.network_sizes import SIZES
from benchmarks.worker import LEARNING_RATE, WEIGHT_DECAY, loss
from equiformer2.errors import InputError
from equiformer2.files import write_json
from equiformer2.script import origin, run_script

#: The ways without checkpointing.
MEANINGS = {"stored": "every intermediate stored", "kernels": "default kernels"}
WAYS = (*MEANINGS, "checkpointed")


def held() -> int:
    """Bytes that this process holds now."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


def free_memory() -> int:
    """Bytes that this machine has left."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def measure(size: str, batch_name: str, way: str, threads: int) -> dict[str, Any]:
    """One training step in this process, which must be new."""
    torch.set_num_threads(threads)
    limit_memory(held() + free_memory())
    record: dict[str, Any] = {"size": size, "batch": batch_name, "way": way, "imports": peak_memory("cpu")}
    torch.manual_seed(0)
    model = build(SIZES[size], None).train()
    model.activation_checkpointing = way == "checkpointed"
    batch = load_batch(batch_name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    graph = model.build_graph(batch)
    record |= {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "atoms": len(batch.pos),
        "edges": len(graph.distances),
        "before_step": held(),
        "backend": "torch" if way == "stored" else model.resolve_backend().name,
    }
    if way == "stored":
        model.backend = "torch"
        vectors = graph.vectors.requires_grad_()
        graph = dataclasses.replace(graph, distances=torch.linalg.vector_norm(vectors, dim=-1))
    torch.manual_seed(1)
    total = loss(model(batch, graph=graph), batch)
    record["kept_by_forward"] = held() - record["before_step"]
    total.backward()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.grad is not None:
            digest.update(parameter.grad.numpy().tobytes())
    optimizer.step()
    return record | {"loss": total.item(), "gradients": digest.hexdigest()[:16], "peak": peak_memory("cpu")}


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function` in a process of its own; None where the memory does not suffice."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, MemoryError):
            return None
        except RuntimeError as error:
            if "alloc" not in str(error):
                raise
            return None


def expected_peak(records: list[dict[str, Any]], size: str, atoms: int, way: str) -> float:
    """Bytes, from what batches of other numbers of atoms took; 0 when nothing is known."""
    known = [each for each in records if (each["size"], each["way"]) == (size, way)]
    return max(
        (
            each["before_step"] + (each["peak"] - each["before_step"]) * atoms / each["atoms"]
            for each in known
        ),
        default=0.0,
    )


def compared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every network and batch: peaks as shares of those without, of the process and of the step alone."""
    rows = []
    for size, batch in dict.fromkeys((each["size"], each["batch"]) for each in records):
        ways = {each["way"]: each for each in records if (each["size"], each["batch"]) == (size, batch)}
        if "checkpointed" not in ways:
            continue
        row: dict[str, Any] = {"size": size, "batch": batch}
        last = ways["checkpointed"]
        for way in MEANINGS:
            if way in ways:
                other = ways[way]
                row[f"peak_of_{way}"] = last["peak"] / other["peak"]
                row[f"step_of_{way}"] = (last["peak"] - last["before_step"]) / (
                    other["peak"] - other["before_step"]
                )
        if "kernels" in ways:
            row["same_gradients"] = last["gradients"] == ways["kernels"]["gradients"]
        rows.append(row)
    return rows


def sentences(row: dict[str, Any]) -> list[str]:
    """The figures of one network and batch."""
    where = f"{row['size']} {row['batch']}: peak memory with activation checkpointing is"
    lines = [
        f"{where} {100 * row[f'peak_of_{way}']:.1f} % of that without, {meaning} "
        f"({100 * row[f'step_of_{way}']:.1f} % of what the step adds)"
        for way, meaning in MEANINGS.items()
        if f"peak_of_{way}" in row
    ]
    if "same_gradients" in row:
        lines.append(
            f"{row['size']} {row['batch']}: gradients {'equal' if row['same_gradients'] else 'DIFFER'}"
        )
    return lines


def main(words: Sequence[str] | None = None, in_process: Callable[..., Any] = in_fresh_process) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="83M", help=f"of {', '.join(SIZES)} (default: %(default)s)")
    parser.add_argument("--batches", default="B1,B4", help=f"of {', '.join(BATCHES)} (default: %(default)s)")
    parser.add_argument("--ways", default=",".join(WAYS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args(words)
    for option, known in (("sizes", SIZES), ("batches", BATCHES), ("ways", WAYS)):
        unknown = set(getattr(given, option).split(",")) - set(known)
        if unknown:
            raise InputError(f"--{option} {min(unknown)}: known are {', '.join(known)}")
    if not Path("/proc/self/status").exists():
        raise InputError("memory is read from /proc, which this system does not have: measure on Linux")
    records: list[dict[str, Any]] = []
    left_out: list[str] = []
    options = (getattr(given, name).split(",") for name in ("sizes", "batches", "ways"))
    cases = list(itertools.product(*options))
    for size, batch, way in cases:
        free = free_memory()
        fits = expected_peak(records, size, len(load_batch(batch).pos), way) <= free
        record = in_process(measure, size, batch, way, given.threads) if fits else None
        if record is None:
            left_out.append(f"{size} {batch} {way}: needs more than the {free / 2**30:.1f} GiB that are free")
            print(left_out[-1], flush=True)
        else:
            records.append(record)
            gib = {name: record[name] / 2**30 for name in ("peak", "before_step", "kept_by_forward")}
            shown = ", ".join(f"{name} {value:.2f} GiB" for name, value in gib.items())
            print(f"{size} {batch} {way}: {shown}", flush=True)
        if given.json is not None:
            made = {**origin(), "package": package_digest(), "machine": describe_machine()}
            measured = {"measured": records, "shares": compared(records), "left_out": left_out}
            write_json(given.json, {**made, "threads": given.threads, **measured})
    for row in compared(records):
        print("\n".join(sentences(row)))


if __name__ == "__main__":
    run_script(main)

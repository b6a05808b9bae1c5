"""Time two checkouts of this project against each other: forward passes and training steps on a CPU.

    python -m benchmarks.compare_versions --before ../old --after . [--json FILE]

One process per checkout holds the networks; the two take turns call by call, so that a slow minute of the
machine meets both. Networks have the sizes of the paper and random weights of one seed, the structure is the
benchmark's first slab (73 atoms). The answers of both checkouts are compared before anything is timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from equiformer2.errors import InputError
from equiformer2.files import check_target, write_json
from equiformer2.script import origin, run_script

STRUCTURES = Path(__file__).with_name("structures.pt")

# Runs in either checkout, so it may use only names that both have.
WORKER = """
import json, sys, time
import torch
from torch_geometric.data import Batch, Data
from equiformer2 import EquiformerV2, ModelConfig

stored = torch.load(sys.argv[1], weights_only=True)[0]
data = Data(
    pos=stored["positions"].float(), atomic_numbers=stored["numbers"].long(),
    cell=stored["cell"].float().view(1, 3, 3), pbc=stored["pbc"].bool().view(1, 3),
    natoms=len(stored["numbers"]),
)
batch = Batch.from_data_list([data])
models = {}

def model_of(size, backend, training):
    key = size, backend, training
    if key not in models:
        models.clear()
        torch.manual_seed(0)
        model = EquiformerV2(ModelConfig.preset(size))
        for parameter in model.parameters():  # biases and heads start at zero, which would hide differences
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        model.backend = backend
        if training:
            model.train()
        else:
            model.requires_grad_(False)
            model.fold_weights()
        models[key] = model
    return models[key]

def forward(model):
    with torch.no_grad():
        return model(batch)

def step(model):
    torch.manual_seed(1)
    model.zero_grad()
    out = model(batch)
    (out["energy"].sum() + out["forces"].square().sum()).backward()
    return out

for line in sys.stdin:
    case = json.loads(line)
    model = model_of(case["size"], case["backend"], case["training"])
    run = step if case["training"] else forward
    started = time.perf_counter()
    out = run(model)
    seconds = time.perf_counter() - started
    answers = [out["energy"].flatten().tolist(), out["forces"].flatten().tolist()]
    print(json.dumps({"seconds": seconds, "answers": answers if case["answers"] else None}), flush=True)
"""


class Checkout:
    """A process that computes with the code of one checkout.

    Args:
        folder: the checkout.
        threads: number of threads of the process.

    Raises:
        InputError: the folder is no checkout of the project.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        if not (folder / "equiformer2" / "model").is_dir():
            raise InputError(f"{folder} is no checkout of this project: it has no folder equiformer2/model")
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": str(threads)}
        # An idle process must not spin against the one that is timed.
        environment["OMP_WAIT_POLICY"] = "passive"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(STRUCTURES.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=folder,
            encoding="utf-8",
        )

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run one call of a case and return its `seconds` and, where asked for, `answers`."""
        stdin: IO[str] = self.process.stdin  # type: ignore[assignment]
        stdout: IO[str] = self.process.stdout  # type: ignore[assignment]
        stdin.write(json.dumps(case) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise InputError(f"the checkout {self.folder} stopped in the case {case}")
        return json.loads(line)  # type: ignore[no-any-return]


def largest_difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Largest difference of two sets of answers, relative to the largest number of each output."""
    return max(
        max(abs(a - b) for a, b in zip(x, y, strict=True)) / max(map(abs, x))
        for x, y in zip(one, other, strict=True)
    )


def compare(
    before: Path, after: Path, sizes: Sequence[str], repeats: int, threads: int
) -> list[dict[str, Any]]:
    """Time every case in both checkouts, taking turns.

    Returns:
        One row per case: medians in ms before and after, the median of the ratios of neighbouring calls with
        its quartiles, and the largest relative difference of the answers.
    """
    checkouts = [Checkout(folder, threads) for folder in (before, after)]
    rows = []
    for size in sizes:
        for backend in ("cpp", "torch"):
            for training in (False, True):
                case = {"size": size, "backend": backend, "training": training, "answers": True}
                first, second = (checkout.run(case)["answers"] for checkout in checkouts)
                seconds: list[tuple[float, float]] = []
                for repeat in range(repeats):
                    turn = (0, 1) if repeat % 2 == 0 else (1, 0)
                    times = {at: checkouts[at].run({**case, "answers": False})["seconds"] for at in turn}
                    seconds.append((times[0], times[1]))
                low, middle, high = statistics.quantiles([b / a for a, b in seconds], n=4)
                rows.append(
                    {
                        "size": size,
                        "backend": backend,
                        "what": "training step" if training else "forward",
                        "before_ms": 1000 * statistics.median(a for a, _ in seconds),
                        "after_ms": 1000 * statistics.median(b for _, b in seconds),
                        "ratio": middle,
                        "ratio_quartiles": [low, high],
                        "answers_differ": largest_difference(first, second),
                    }
                )
                row = rows[-1]
                print(
                    f"{size:5} {backend:6} {row['what']:14} "
                    f"{row['before_ms']:8.1f} ms {row['after_ms']:8.1f} ms  "
                    f"ratio {middle:.3f} ({low:.3f} to {high:.3f})  "
                    f"answers differ by {row['answers_differ']:.1e}",
                    flush=True,
                )
    for checkout in checkouts:
        checkout.process.kill()
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Compare and print; write the rows where a file is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="folder of the older checkout")
    parser.add_argument("--after", type=Path, required=True, help="folder of the newer checkout")
    parser.add_argument("--sizes", nargs="+", default=["31M", "83M"], help="presets of the network")
    parser.add_argument("--repeats", type=int, default=9, help="number of timed calls per case and checkout")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="number of threads of a process"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(words)
    if options.json is not None:
        check_target(options.json)
    rows = compare(options.before, options.after, options.sizes, options.repeats, options.threads)
    if options.json is not None:
        write_json(options.json, {**origin(), "rows": rows})


if __name__ == "__main__":
    run_script(main)

"""Train the same network with this package and with fairchem-core's trainer, and compare the losses.

    python -m studies.study_data
    python -m benchmarks.compare_loss_curves --reference-python .bench-venv/bin/python

The environment of fairchem-core 1.10 comes from `benchmarks/setup_reference.sh`. Structures, their order,
edges, initial weights and settings are the same (`loss_curve_data`); there is no dropout. This package trains
as `equiformer2 train` does, once as usual and once with the plain expressions that run when derivatives with
respect to positions are wanted. fairchem's trainer (`fairchem_training`) draws its edge frames at random and
runs once per seed; these curves are the band. A curve that is complete is kept, so the same command goes on
after an interruption. Writes OUT.json, OUT.png and OUT.md; exit status 3 where the losses before any update
differ by more than 1e-5.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from tqdm import tqdm

from benchmarks.loss_curve_data import CurveSettings, prepare
from benchmarks.loss_curve_report import (
    FIRST_TOLERANCE,
    OURS,
    PLAIN,
    draw,
    markdown,
    parameter_distances,
    summarize,
)
from benchmarks.worker_session import BenchmarkError
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_bytes, write_json
from equiformer2.script import origin, run_script, show_log
from equiformer2.training.configuration import parse
from equiformer2.training.run import train


class DifferentLossError(BenchmarkError):
    """The losses before any update differ, so that the curves could not be compared."""


class PlainExpressions(Callback):
    """Ask for derivatives with respect to positions, for which the network leaves its chunked kernels."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch.pos.requires_grad_(True)


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--data", default="runs/data/study/train_1_2.lmdb", help="LMDB to train on (default: %(default)s)")
    add("--config", default="configs/study.yaml", help="settings of the training (default: %(default)s)")
    add("--out", type=Path, default=Path("docs/results/loss_curves"), help="path without ending")
    add(
        "--work",
        type=Path,
        default=Path("runs/loss_curves"),
        help="folder of the curves (default: %(default)s)",
    )
    add("--steps", type=int, default=500, help="default: %(default)s")
    add("--batch-size", type=int, default=4, help="structures per step (default: %(default)s)")
    add("--seeds", type=int, default=3, help="trainings of the reference (default: %(default)s)")
    add("--threads", type=int, default=1, help="number of threads of each training (default: %(default)s)")
    add("--reference-python", default=".bench-venv/bin/python", help="default: %(default)s")
    return parser.parse_args(words)


def train_ours(settings: CurveSettings, name: str) -> dict[str, Any]:
    """Train with this package; `name` is that of the curve."""
    config = parse(settings.words(name))
    if name == PLAIN:
        config = replace(config, trainer=config.trainer | {"callbacks": [PlainExpressions()]})
    folder = train(config)
    rows = list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text(encoding="utf-8"))))
    columns = {"loss": "train/loss", "grad_norm": "train/grad_norm", "next_lr": "lr"}
    steps = [
        {name: float(row[column]) for name, column in columns.items()} for row in rows if row["train/loss"]
    ]
    return {"steps": steps, "checkpoint": f"{name}/checkpoints/last.pt"}


def train_reference(
    python: str, settings: CurveSettings, seed: int, threads: int, check: Callable[[float], None]
) -> dict[str, Any]:
    """Train with fairchem-core in a process of its environment.

    Args:
        python: of that environment.
        settings: of the curves.
        seed: of the edge frames.
        threads: of the process.
        check: takes the loss before any update; may raise, which ends the process.

    Raises:
        BenchmarkError: the process has failed; its log is named.
    """
    name = f"reference_{seed}"
    log = settings.folder / f"{name}.log"
    found: dict[str, Any] = {"steps": []}
    command = [os.path.abspath(python), "-m", "benchmarks.fairchem_training", str(settings.folder.resolve())]
    with (
        log.open("w") as errors,
        tqdm(total=settings.steps, desc=name, disable=None) as bar,
        _process([*command, str(seed)], threads, errors) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            row = json.loads(line)
            if "loss" not in row:
                found |= row
                continue
            if not found["steps"]:
                check(row["loss"])
            found["steps"].append({key: row[key] for key in ("loss", "grad_norm", "lr")})
            bar.update()
    if process.returncode or "checkpoint" not in found:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        raise BenchmarkError(f"{name} ended with status {process.returncode}: {last} ({log})")
    return found


@contextmanager
def _process(command: list[str], threads: int, errors: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a process from the clone's root, and end it with the block."""
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        encoding="utf-8",
    )
    try:
        yield process
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()


def make_curves(given: argparse.Namespace, settings: CurveSettings) -> dict[str, dict[str, Any]]:
    """Train every curve that is not there yet; by name, in the order in which they are made."""
    curves: dict[str, dict[str, Any]] = {}

    def curve(name: str, make: Callable[[], dict[str, Any]]) -> None:
        path = settings.folder / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        curves[name] = read_json(path)
        print(
            f"{name}: {len(curves[name]['steps'])} steps, last loss {curves[name]['steps'][-1]['loss']:.3f}"
        )

    def check(loss: float) -> None:
        ours = curves[OURS]["steps"][0]["loss"]
        if abs(loss - ours) > FIRST_TOLERANCE * loss:
            raise DifferentLossError(f"before any update the reference's loss is {loss!r} and ours {ours!r}")

    curve(OURS, partial(train_ours, settings, OURS))
    for seed in range(given.seeds):
        python, threads = given.reference_python, given.threads
        curve(f"reference_{seed}", partial(train_reference, python, settings, seed, threads, check))
    curve(PLAIN, partial(train_ours, settings, PLAIN))
    return curves


def main(words: Sequence[str] | None = None) -> int:
    given = parse_arguments(words)
    if min(given.steps, given.batch_size, given.threads) < 1 or given.seeds < 2:
        raise InputError("--steps, --batch-size and --threads must be at least 1, --seeds at least 2")
    for ending in (".json", ".png", ".md"):
        check_target(given.out.with_suffix(ending), inputs=[given.data, given.config])
    if not Path(given.reference_python).exists():
        raise InputError(
            f"{given.reference_python} not found: run benchmarks/setup_reference.sh, "
            "or give --reference-python"
        )
    show_log()
    torch.set_num_threads(given.threads)
    settings = CurveSettings(given.data, given.config, given.steps, given.batch_size, given.work)
    shared = prepare(settings)
    try:
        curves = make_curves(given, settings)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, DifferentLossError) else 1
    distances = parameter_distances(settings.folder / "weights.pt", curves)
    record = {**origin(), **summarize(shared, curves, distances)}
    write_json(given.out.with_suffix(".json"), record)
    write_bytes(given.out.with_suffix(".png"), draw(record))
    write_bytes(given.out.with_suffix(".md"), markdown(record, given.out.with_suffix(".png").name).encode())
    print(f"results: {given.out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    run_script(main)

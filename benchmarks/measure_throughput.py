"""Throughput on a CPU: several batches of an evaluation at a time, and several processes of a training.

    python -m studies.study_data
    python -m benchmarks.measure_throughput --data runs/data/study/test.lmdb --json results.json

Every setting has a process of its own with the weights loaded; they take turns for several rounds. `side by
side` computes several batches at a time on one thread each, which is what `evaluate`, `predict` and batched
relaxations do; `inside` gives all threads to one batch. Predictions of the settings with one thread per batch
are compared bit by bit. At the end each runs beside a process that keeps one thread busy.

    python -m benchmarks.measure_throughput --part calls --data runs/data/study/train.lmdb --structures 1760 …

times whole calls of `equiformer2 evaluate` on the first structures of the file less calls on its first 13, so
that starting threads counts and loading does not, with one thread, with all, and with a CPU mask of one core.

    python -m benchmarks.measure_throughput --part training …

times `equiformer2 train --config configs/study.yaml` with one process on one thread and on all, and with
`--processes`, each on one thread, which share the structures of a step: a run of `--steps` steps less one of
a few. The file of `--json` keeps the results of the other parts.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.script import origin, run_script

BUNDLED = Path("data/teacher")
CONFIG = Path("configs/study.yaml")
#: Structures of the short call of the part `calls`, and steps of the short run of the part `training`.
FEW, FEW_STEPS = 13, 5
#: Structures of a training step.
STEP = 4
#: Name of a setting -> threads of its process, and whether a batch gets all of them.
SETTINGS = {"one thread": (1, False), "side by side": (None, False), "inside": (None, True)}


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="LMDB file (default: frames of data/teacher)")
    parser.add_argument("--checkpoint", default="oc20_small", help="default: %(default)s")
    parser.add_argument(
        "--structures", type=int, default=440, help="number of structures (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="structures per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements per setting (default: %(default)s)"
    )
    parser.add_argument(
        "--part", choices=list(PARTS), default="loop", help="part to time (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="training steps that are timed (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="processes of a training (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--worker", choices=list(SETTINGS), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def serve(arguments: argparse.Namespace) -> None:
    """Load network and structures, then predict them once for every line on standard input.

    Prints a JSON line per round: `seconds` and a digest of the predictions.
    """
    import torch
    from torch_geometric.data import Batch

    from datasets_oc20 import OC20Lmdb
    from datasets_oc20.datamodule import collate
    from equiformer2.inference import Predictor

    dataset = OC20Lmdb(arguments.data)
    count = min(arguments.structures, len(dataset))
    batches: list[Batch] = [
        collate([dataset[index] for index in range(first, min(first + arguments.batch_size, count))])
        for first in range(0, count, arguments.batch_size)
    ]
    predictor = Predictor(arguments.checkpoint)
    inside = SETTINGS[arguments.worker][1]
    predictor.predict(batches[0])

    def round_() -> str:
        digest = hashlib.sha256()
        if inside:
            outs = [predictor.predict(batch) for batch in batches]
        else:
            outs = [out for _, out in predictor.predict_batches(iter(batches), len(batches))]
        for out in outs:
            for name in sorted(out):
                digest.update(out[name].numpy().tobytes())
        return digest.hexdigest()

    round_()
    print(json.dumps({"structures": count, "threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        answer = round_()
        print(json.dumps({"seconds": time.perf_counter() - started, "answer": answer}), flush=True)


@contextmanager
def busy_process() -> Iterator[None]:
    """Context beside a process that keeps one thread busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all settings in turn.

    Returns:
        `structures`, `threads`, `same_bits`, and per setting the seconds of each round, alone and `busy`.
    """
    workers = {}
    results: dict[str, Any] = {"settings": {}}
    try:
        for name, (threads, _) in SETTINGS.items():
            environment = dict(os.environ)
            if threads is not None:
                environment["OMP_NUM_THREADS"] = str(threads)
            workers[name] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "benchmarks.measure_throughput", "--worker", name),
                    *("--data", str(arguments.data), "--checkpoint", arguments.checkpoint),
                    *("--structures", str(arguments.structures), "--batch-size", str(arguments.batch_size)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env=environment,
            )
            results |= _answer(workers[name])
            results["settings"][name] = {"alone": [], "busy": []}
        answers = set()
        for _ in range(arguments.rounds):
            for name, worker in workers.items():
                row = _ask(worker)
                results["settings"][name]["alone"].append(row["seconds"])
                answers |= set() if SETTINGS[name][1] else {row["answer"]}
        with busy_process():
            for name, worker in workers.items():
                results["settings"][name]["busy"] += [_ask(worker)["seconds"] for _ in range(2)]
        results["same_bits"] = len(answers) == 1
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return results


def _ask(worker: "subprocess.Popen[str]") -> dict[str, Any]:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return _answer(worker)


def _answer(worker: "subprocess.Popen[str]") -> dict[str, Any]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise InputError("a measuring process has ended; its error stands above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def measure_calls(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time whole calls of `equiformer2 evaluate`, in turn for every round.

    Returns:
        `structures` and, per setting, the seconds of each round for all structures less those for `FEW`.

    Raises:
        InputError: the file has fewer structures than asked for.
    """
    one_core = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "one thread": ([], {"OMP_NUM_THREADS": "1"}),
        "all threads": ([], {}),
        "mask of one core": (one_core, {}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        files = {count: Path(folder) / f"{count}.lmdb" for count in (FEW, arguments.structures)}
        for count, path in files.items():
            _copy_first(arguments.data, count, path)
        for _ in range(arguments.rounds):
            for name, (prefix, environment) in commands.items():
                taken = {}
                for count, path in files.items():
                    words = [*("evaluate", "--checkpoint", arguments.checkpoint, "--data", str(path))]
                    words += ["--batch-size", str(arguments.batch_size)]
                    taken[count] = _time_command(words, environment, prefix)
                seconds[name].append(taken[arguments.structures] - taken[FEW])
    return {"structures": arguments.structures - FEW, "settings": seconds}


def measure_training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time runs of `equiformer2 train` with one process and with several, in turn for every round.

    Returns:
        `structures` that `--steps` steps see and, per setting, the seconds of each round for a run of
        `--steps` and `FEW_STEPS` steps less those for one of `FEW_STEPS`.

    Raises:
        InputError: the processes cannot share a step evenly.
    """
    if arguments.processes < 2 or STEP % arguments.processes:
        raise InputError(f"--processes {arguments.processes} cannot share steps of {STEP} structures evenly")
    one_thread = {"OMP_NUM_THREADS": "1"}
    settings: dict[str, tuple[int, dict[str, str]]] = {
        "one process": (1, one_thread),
        "all threads": (1, {}),
        f"{arguments.processes} processes": (arguments.processes, one_thread),
    }
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for setting, (processes, environment) in settings.items():
                taken = {}
                for steps in (FEW_STEPS, FEW_STEPS + arguments.steps):
                    run = f"{setting} {steps} {number}".replace(" ", "_")
                    words = [*("train", "--config", str(CONFIG), "--name", run, "--runs_dir", folder)]
                    words += [f"--data.batch_size={STEP // processes}", f"--trainer.devices={processes}"]
                    words += [f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"]
                    words += ["--data.train", json.dumps([str(arguments.data)])]
                    taken[steps] = _time_command(words, environment)
                seconds[setting].append(taken[FEW_STEPS + arguments.steps] - taken[FEW_STEPS])
    return {"structures": STEP * arguments.steps, "settings": seconds}


def _time_command(words: Sequence[str], environment: Mapping[str, str], prefix: Sequence[str] = ()) -> float:
    """Seconds of a command of `equiformer2`.

    Raises:
        InputError: it failed.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "equiformer2", *words],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise InputError(f"`equiformer2 {words[0]}` failed: {told[-1]}")
    return time.perf_counter() - started


def _copy_first(source: Path, count: int, target: Path) -> None:
    """Write the first `count` structures of an LMDB file to another."""
    from datasets_oc20 import OC20Lmdb
    from datasets_oc20.writer import LmdbWriter

    dataset = OC20Lmdb(source)
    if len(dataset) < count:
        raise InputError(f"{source} has {len(dataset)} structures: give --structures {len(dataset)} or less")
    with LmdbWriter(target, dataset.energy_kind) as writer:
        for index in range(count):
            writer.write(dataset[index])


def table(results: dict[str, Any]) -> str:
    """Format the medians, the ratio to one thread, and the ratio beside a busy process, as text."""
    medians = {
        name: {kind: statistics.median(seconds) for kind, seconds in rows.items()}
        for name, rows in results["settings"].items()
    }
    one = medians["one thread"]["alone"]
    lines = [
        f"{results['structures']} structures, {results['threads']} threads, predictions "
        + ("equal bit by bit" if results["same_bits"] else "NOT equal"),
        f"{'setting':14} {'alone, s':>10} {'speed':>7} {'beside a busy process, s':>26} {'slower':>7}",
    ]
    lines += [
        f"{name:14} {row['alone']:10.2f} {one / row['alone']:6.2f}x {row['busy']:26.2f} "
        f"{row['busy'] / row['alone']:6.2f}x"
        for name, row in medians.items()
    ]
    return "\n".join(lines)


def differences(results: dict[str, Any]) -> str:
    """Format the medians of the parts `calls` and `training` and their ratio to the first setting."""
    medians = {name: statistics.median(seconds) for name, seconds in results["settings"].items()}
    first = next(iter(medians.values()))
    lines = [
        f"{results['structures']} structures more in a call",
        f"{'setting':18} {'s':>8} {'per second':>11} {'speed':>7}",
    ]
    for name, each in medians.items():
        lines.append(f"{name:18} {each:8.2f} {results['structures'] / each:11.2f} {first / each:6.2f}x")
    return "\n".join(lines)


#: What can be timed: the measurement, and its table.
PARTS = {
    "loop": (measure, table),
    "calls": (measure_calls, differences),
    "training": (measure_training, differences),
}


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(words)
    if arguments.worker:
        serve(arguments)
        return
    if arguments.data is None:
        arguments.data = bundled_structures()
    run, show = PARTS[arguments.part]
    about = {**origin(), "machine": describe_machine(), "rounds": arguments.rounds}
    results = run(arguments)
    print(show(results))
    if arguments.json:
        others = read_json(arguments.json) if arguments.json.exists() else {}
        part = {arguments.part: {**about, **results}}
        write_json(arguments.json, {**others, **origin(), **part}, make_folder=True)


def bundled_structures() -> Path:
    """Write the frames of data/teacher to an LMDB in a temporary folder, and return its path."""
    from datasets_oc20.preprocess import preprocess

    path = Path(tempfile.mkdtemp()) / "teacher.lmdb"
    preprocess(BUNDLED, path)
    return path


if __name__ == "__main__":
    run_script(main)

"""Kill a real run again and again at random moments; what is left must be the run that nobody disturbed.

    python tests/training/killed_runs.py FOLDER KILLS

The run is `train()` with all its files in a process of its own. Exit status 0 and a summary, or an error.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tiny_run import TINY_RUN
from torch_geometric.data import Batch

from equiformer2.training.configuration import parse
from equiformer2.training.folder import read_rows
from equiformer2.training.run import train
from equiformer2.training.task import S2EFTask

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
CHANGING = {"train/structures_per_second", "train/atoms_per_second"}
FORK = multiprocessing.get_context("fork")  # spares every attempt the import of torch


def child(folder: Path, name: str) -> None:
    """One attempt: starts the run, or goes on with it; notes the frames of every step."""
    torch.set_num_threads(1)
    training_step = S2EFTask.training_step

    def noting(task: S2EFTask, batch: Batch, batch_idx: int) -> torch.Tensor:
        with (folder / f"{name}.samples").open("a") as file:
            file.write(json.dumps([task.global_step, batch.fid.tolist()]) + "\n")
        return training_step(task, batch, batch_idx)

    S2EFTask.training_step = noting  # type: ignore[method-assign]
    log = os.open(folder / f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    own = [f"--runs_dir={folder}", f"--name={name}", "--ckpt_path=auto", "--checkpoint_every_n_steps=3"]
    train(parse([*TINY_RUN, *own, "--data.batch_size=2", "--trainer.max_epochs=4", "--model.alpha_drop=0.1"]))


def start(folder: Path, name: str) -> BaseProcess:
    process = FORK.Process(target=child, args=(folder, name))
    process.start()
    return process


def samples(folder: Path, name: str) -> dict[int, list[int]]:
    """The frames of every step, as they were when it was last done."""
    lines = (folder / f"{name}.samples").read_text().splitlines()
    return {step: fids for step, fids in map(json.loads, lines)}


def curves(folder: Path, name: str) -> list[dict[str, str]]:
    rows = read_rows(folder / name / "metrics.csv")
    return [{key: value for key, value in row.items() if key not in CHANGING} for row in rows]


def differences(left: Any, right: Any, where: str) -> list[str]:
    """Places where two nested contents are not bit-equal."""
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [where]
    if isinstance(left, dict):
        keys = [] if left.keys() == right.keys() else [f"{where}: keys"]
        return keys + [d for key in left for d in differences(left[key], right.get(key), f"{where}.{key}")]
    if isinstance(left, list | tuple):
        sizes = [] if len(left) == len(right) else [f"{where}: length"]
        pairs = enumerate(zip(left, right, strict=False))
        return sizes + [d for number, (a, b) in pairs for d in differences(a, b, f"{where}.{number}")]
    return [] if left == right else [where]


def state(folder: Path, name: str) -> dict[str, Any]:
    """Everything that must not depend on whether the run was disturbed."""
    checkpoints = folder / name / "checkpoints"
    last = torch.load(checkpoints / "last.ckpt", weights_only=True)
    progress = last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    native = {file: torch.load(checkpoints / file, weights_only=True)["weights"] for file in NATIVE}
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    generators = last["callbacks"]["ResumeCheckpoint"]["random"]
    best = last["callbacks"]["NativeCheckpoints"]
    found = {key: last[key] for key in kept}
    return {**found, "progress": progress, "native": native, "generators": generators, "best": best}


NATIVE = ("last.pt", "best.pt")


def main(folder: Path, kills: int) -> None:
    begun = time.monotonic()
    whole = start(folder, "whole")
    whole.join()
    seconds = time.monotonic() - begun
    assert whole.exitcode == 0, (folder / "whole.out").read_text()[-3000:]
    expected, rounds = state(folder, "whole"), 0
    rng = random.Random(kills)
    done: dict[str, int] = {sent.name: 0 for sent in SIGNALS}
    while sum(done.values()) < kills:
        name, rounds = f"killed{rounds}", rounds + 1
        while True:
            attempt = start(folder, name)
            attempt.join(rng.uniform(0.05, 0.6) * seconds if sum(done.values()) < kills else None)
            if attempt.exitcode is not None:
                break
            sent = SIGNALS[sum(done.values()) % len(SIGNALS)]
            os.kill(attempt.pid, sent)  # type: ignore[arg-type]
            attempt.join()
            if attempt.exitcode == 0:
                break
            assert attempt.exitcode in (-sent, 128 + sent), (folder / f"{name}.out").read_text()[-3000:]
            done[sent.name] += 1
        assert attempt.exitcode == 0, (folder / f"{name}.out").read_text()[-3000:]
        assert samples(folder, name) == samples(folder, "whole"), name
        assert curves(folder, name) == curves(folder, "whole"), name
        different = differences(expected, state(folder, name), name)
        assert not different, different
    print(f"{sum(done.values())} kills ({done}) in {rounds} runs of {len(samples(folder, 'whole'))} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

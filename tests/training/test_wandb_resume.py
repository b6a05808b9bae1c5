"""A killed run goes on in its W&B run, at the right steps."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from launching import finish, start
from wandb_files import history

from equiformer2.training.folder import read_rows

pytest.importorskip("wandb")

STEPS = 60
#: What ends the process, after how many logged steps, and its status.
ENDS = ((signal.SIGKILL, 11, -9), (signal.SIGTERM, 29, 143), (None, STEPS, 0))


def logged_losses(run: Path) -> dict[int, float]:
    rows = read_rows(run / "metrics.csv")
    return {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}


@pytest.mark.slow
def test_a_killed_run_goes_on_in_its_wandb_run(tmp_path: Path, tiny_arguments: list[str]) -> None:
    arguments = [*tiny_arguments, "--wandb.project=test", "--wandb.offline=true", "--ckpt_path=auto"]
    arguments += ["--data.batch_size=1", "--trainer.max_epochs=3", "--checkpoint_every_n_steps=4"]
    run = tmp_path / "run"
    saved = [0]
    for sent, after, status in ENDS:
        process = start(arguments, tmp_path, "run")
        while sent is not None and len(logged_losses(run)) < after:
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.02)
        if sent is not None:
            os.kill(process.pid, sent)
        finish([process], status)
        saved.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])
    assert saved[-1] == STEPS

    files = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)
    assert len(files) == len(ENDS)
    assert {path.stem for path in files} == {f"run-{(run / 'wandb_id.txt').read_text()}"}
    sent_losses: dict[int, float] = {}
    for number, path in enumerate(files):
        rows = [row for row in history(path) if "train/loss" in row]
        steps = [row["trainer/global_step"] for row in rows]
        first, end = saved[number], saved[number + 1]
        assert steps == list(range(first, first + len(steps)))
        # Caught signals, and the end, lose nothing; a killed process what W&B had not written.
        assert number == 0 or steps[-1] == end - 1
        sent_losses.update({row["trainer/global_step"]: row["train/loss"] for row in rows})
    logged = logged_losses(run)
    assert logged.keys() == set(range(STEPS))
    assert set(range(saved[1], STEPS)) <= sent_losses.keys()
    for step, loss in sent_losses.items():
        assert loss == pytest.approx(logged[step], rel=1e-6)

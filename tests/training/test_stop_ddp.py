"""Two processes that are stopped, together or one alone, end without hanging and go on exactly."""

import os
import signal
import time
from pathlib import Path

import pytest
from killed_runs import curves, differences, state
from launching import Processes, finish, start_two

from equiformer2.training.folder import read_rows

pytestmark = pytest.mark.slow

#: Launcher, signal, the processes that get it (of those that were started), the status of the first.
STOPS = (
    ("srun", signal.SIGUSR1, (0, 1), 128 + signal.SIGUSR1),
    ("srun", signal.SIGTERM, (1,), 128 + signal.SIGTERM),
    ("srun", signal.SIGTERM, (0,), 128 + signal.SIGTERM),
    ("lightning", signal.SIGINT, (0,), 128 + signal.SIGINT),
    ("srun", signal.SIGKILL, (1,), 1),
)
STEPS = 80  # of 2 x 1 structures in 8 epochs


def wait_for_step(processes: Processes, metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 1800
    while not any(int(row["step"]) >= step for row in read_rows(metrics)):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stopped_processes_go_on_exactly(tmp_path: Path, tiny_arguments: list[str]) -> None:
    arguments = [*tiny_arguments, "--data.batch_size=1", "--trainer.max_epochs=8", "--model.alpha_drop=0.1"]
    arguments += ["--checkpoint_every_n_steps=3", "--ckpt_path=auto"]
    finish(start_two(arguments, tmp_path, "whole", "srun"))
    for number, (launcher, sent, ranks, status) in enumerate(STOPS):
        processes = start_two(arguments, tmp_path, "stopped", launcher)
        wait_for_step(processes, tmp_path / "stopped" / "metrics.csv", 7 + 13 * number)
        for rank in ranks:
            os.kill(processes[rank].pid, sent)
        errors = finish(processes, status, timeout=1800)
        stopped = sent != signal.SIGKILL
        assert [process.returncode for process in processes[1:]] == [0 if stopped else -sent] * (
            len(processes) - 1
        )
        assert ("Traceback" not in errors[0]) == stopped, errors[0][-3000:]
    finish(start_two(arguments, tmp_path, "stopped", "srun"))
    assert len([row for row in curves(tmp_path, "whole") if row["train/loss"]]) == STEPS
    assert curves(tmp_path, "stopped") == curves(tmp_path, "whole")
    different = differences(state(tmp_path, "whole"), state(tmp_path, "stopped"), "")
    assert not different, different

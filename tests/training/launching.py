"""`scripts/train.py` in processes of its own, started as its users start it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "train.py")
Process: TypeAlias = "subprocess.Popen[str]"
Processes: TypeAlias = "list[subprocess.Popen[str]]"
LAUNCHERS = ("lightning", "torchrun", "srun")


def start(
    arguments: Sequence[str], runs: Path, name: str, environment: dict[str, str] | None = None
) -> Process:
    """One process; nothing that depends on which process draws it is switched on."""
    return _popen([SCRIPT, *_own(arguments, runs, name)], runs, environment)


def start_two(arguments: Sequence[str], runs: Path, name: str, launcher: str) -> Processes:
    """Two processes on this machine; those that were started, of which the first says how it ended."""
    arguments = [*_own(arguments, runs, name), "--trainer.devices=2"]
    if launcher == "lightning":
        return [_popen([SCRIPT, *arguments], runs)]
    if launcher == "torchrun":
        place = ["--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        return [_popen(["-m", "torch.distributed.run", *place, SCRIPT, *arguments], runs)]
    job = slurm_job()
    return [_popen([SCRIPT, *arguments], runs, {**job, **slurm_task(rank)}) for rank in range(2)]


def slurm_job() -> dict[str, str]:
    """What `srun` tells every process of a job of two on this machine."""
    return {
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }


def slurm_task(rank: int) -> dict[str, str]:
    """What it tells one of them."""
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}


def finish(processes: Processes, status: int = 0, timeout: float = 3600) -> list[str]:
    """Waits for all of them; what they wrote to stderr. The first must end with `status`; none may hang."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        raise
    assert processes[0].returncode == status, errors[0][-3000:]
    return errors


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Raw and averaged weights at the end of a run."""
    stored = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["weights"]
    return {f"{kind}.{name}": value for kind in stored for name, value in stored[kind].items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _own(arguments: Sequence[str], runs: Path, name: str) -> list[str]:
    # Dropout is a function of the process.
    return [
        "--model.alpha_drop=0",
        "--model.drop_path_rate=0",
        *arguments,
        f"--runs_dir={runs}",
        f"--name={name}",
    ]


def _popen(command: list[str], runs: Path, environment: dict[str, str] | None = None) -> Process:
    runs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    # A test that logged to W&B leaves its service here; to that one a killed run would be in use for ever.
    environment.pop("WANDB_SERVICE", None)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=runs,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

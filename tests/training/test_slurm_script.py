"""The Slurm script, with stand-ins for Slurm's programs."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"
NOTE = '#!/bin/bash\nprintf "%s\\n" {name} "$@" >> "$NOTES"\nexit {status}\n'


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (138, True)])
def test_only_a_run_that_was_stopped_for_time_is_put_back(
    tmp_path: Path, status: int, requeued: bool
) -> None:
    for name, ending in (("srun", status), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(NOTE.format(name=name, status=ending))
        program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NOTES": str(tmp_path / "notes"),
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_NTASKS_PER_NODE": "8",
    }
    arguments = ["configs/a b.yaml", "--optim.lr", "1e-4"]
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, check=False)
    assert done.returncode == status
    noted = (tmp_path / "notes").read_text().splitlines()
    assert noted[:5] == ["srun", "--wait=600", "python", "scripts/train.py", "--config"]
    assert noted[5] == "configs/a b.yaml"
    told = dict(zip(noted[6:14:2], noted[7:15:2], strict=True))
    assert told == {
        "--trainer.devices": "8",
        "--trainer.num_nodes": "2",
        "--checkpoint_every_n_steps": "1000",
        "--ckpt_path": "auto",
    }
    assert noted[14:16] == ["--optim.lr", "1e-4"]
    assert noted[16:] == (["scontrol", "requeue", "77"] if requeued else [])


def test_without_a_configuration_nothing_starts(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr

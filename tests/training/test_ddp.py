"""Two processes on the CPU train as one with the same global batch."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(arguments: list[str], runs: Path, name: str) -> list[dict[str, str]]:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]
    command += ["--model.alpha_drop=0", "--model.drop_path_rate=0", f"--runs_dir={runs}", f"--name={name}"]
    done = subprocess.run(command, cwd=runs, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with (runs / name / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, tiny_arguments: list[str]) -> None:
    one = run([*tiny_arguments, "--data.batch_size=4"], tmp_path, "one")
    two = run([*tiny_arguments, "--data.batch_size=2", "--trainer.devices=2"], tmp_path, "two")
    compared = ("train/loss", "train/energy_mae", "train/forces_l2", "val/energy_mae", "val/forces_mae")
    assert len(one) == len(two) > 0
    for row, other in zip(one, two, strict=True):
        for name in compared:
            assert bool(row[name]) == bool(other[name])
            if row[name]:
                assert float(other[name]) == pytest.approx(float(row[name]), rel=1e-6, abs=1e-6), (
                    row["step"],
                    name,
                )

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


UNEQUAL_SHARES = """
import os, sys, torch
from torch import distributed as dist
from torch_geometric.data import Data
from equiformer2.training.losses import energy_l1, force_l2
from equiformer2.training.metrics import S2EFMetrics

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(3)
prediction, target = torch.randn(9, 3, generator=generator), torch.randn(9, 3, generator=generator)
energy, true_energy = torch.randn(3, generator=generator), torch.randn(3, generator=generator)
free = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1, 0]).bool()
natoms = torch.tensor([2, 5, 2])
atoms, structures = (slice(0, 2), slice(0, 1)) if rank == 0 else (slice(2, 9), slice(1, 3))

means = torch.stack([
    energy_l1(energy[structures], true_energy[structures]),
    force_l2(prediction[atoms], target[atoms], free[atoms]),
])
dist.all_reduce(means)  # what DDP does: the mean over processes
expected = torch.stack([
    (energy - true_energy).abs().mean(), (prediction - target)[free].norm(dim=1).mean()
])
torch.testing.assert_close(means / 2, expected)

def batch(a, s):
    return Data(pos=target[a], natoms=natoms[s], fixed=~free[a], energy=true_energy[s], forces=target[a])

shared, alone = S2EFMetrics(), S2EFMetrics(sync_on_compute=False)
shared.update({"energy": energy[structures], "forces": prediction[atoms]}, batch(atoms, structures))
alone.update({"energy": energy, "forces": prediction}, batch(slice(None), slice(None)))
expected = alone.compute()
for name, value in shared.compute().items():
    torch.testing.assert_close(value, expected[name])
"""


@pytest.mark.slow
def test_losses_and_metrics_of_unequal_shares(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", UNEQUAL_SHARES, str(rank), str(tmp_path / "store")], cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

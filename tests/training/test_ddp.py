"""Two processes on the CPU train as one with the same global batch, however they are started."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import LAUNCHERS, ROOT, finish, slurm_job, slurm_task, start, start_two, weights
from tiny_checkpoint import write_tiny_checkpoint
from uneven import write_uneven

from datasets_oc20 import OC20Lmdb
from datasets_oc20.sampler import BalancedBatchSampler
from equiformer2.checkpoint.adapter_files import read_adapter
from equiformer2.training.folder import read_rows

pytestmark = pytest.mark.slow

#: Six structures in an epoch are one step: dealt to two processes they are 44 atoms and 20.
SIZES = [33, 5, 8, 6, 7, 5]
STEPS = 12
COMPARED = (
    "train/loss",
    "train/energy_mae",
    "train/forces_l2",
    "train/grad_norm",
    "val/energy_mae",
    "val/forces_mae",
)


def uneven_arguments(tiny_arguments: list[str], folder: Path, lmdb: Path) -> list[str]:
    data = write_uneven(lmdb, folder / "uneven.lmdb", SIZES)
    atoms = OC20Lmdb(data).natoms
    shares = [next(iter(BalancedBatchSampler(6, 3, atoms, rank=rank, world_size=2))) for rank in (0, 1)]
    assert sorted(int(atoms[share].sum()) for share in shares) == [20, 44]
    return [
        *tiny_arguments,
        f"--data.train={data}",
        f"--data.val={data}",
        f"--trainer.max_epochs={STEPS}",
        "--optim.warmup_epochs=2",
    ]


def assert_same_losses(one: Path, two: Path, steps: int) -> None:
    """The same losses, gradient norms and metrics at every step."""
    expected, found = read_rows(one / "metrics.csv"), read_rows(two / "metrics.csv")
    assert len(expected) == len(found)
    assert len([row for row in expected if row["train/loss"]]) == steps
    for row, other in zip(expected, found, strict=True):
        for name in COMPARED:
            assert bool(row[name]) == bool(other[name])
            if row[name]:
                where = (row["step"], name)
                assert float(other[name]) == pytest.approx(float(row[name]), rel=1e-6, abs=1e-6), where


def assert_same_weights(one: Path, two: Path) -> None:
    """Raw and averaged ones, in float64.

    In float32 a gradient that is zero but for rounding is as good as random, and AdamW divides by its size.
    """
    left, right = weights(one), weights(two)
    assert {name.split(".")[0] for name in left} == {"raw", "averaged"}
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_two_processes_with_unequal_shares_equal_one(
    tmp_path: Path, tiny_arguments: list[str], lmdb_path: Path, precision: str
) -> None:
    arguments = uneven_arguments(tiny_arguments, tmp_path, lmdb_path)
    arguments += [f"--trainer.precision={precision}"]
    finish([start([*arguments, "--data.batch_size=6"], tmp_path, "one")])
    finish(start_two([*arguments, "--data.batch_size=3"], tmp_path, "two", "lightning"))
    assert_same_losses(tmp_path / "one", tmp_path / "two", STEPS)
    if precision == "64-true":
        assert_same_weights(tmp_path / "one", tmp_path / "two")
        accumulated = [*arguments, "--data.batch_size=1", "--trainer.accumulate_grad_batches=3"]
        finish(start_two(accumulated, tmp_path, "accumulated", "lightning"))
        assert_same_losses(tmp_path / "one", tmp_path / "accumulated", STEPS)
        assert_same_weights(tmp_path / "one", tmp_path / "accumulated")


def test_two_processes_train_one_adapter(tmp_path: Path, tiny_arguments: list[str], lmdb_path: Path) -> None:
    """Every process chooses the same entries, and they end as those of one process."""
    base = write_tiny_checkpoint(tmp_path / "base.pt")
    arguments = [
        *uneven_arguments(tiny_arguments, tmp_path, lmdb_path),
        *("--trainer.max_epochs=3", "--trainer.precision=64-true", f"--init_from={base}"),
        *("--adapter.rank=2", "--adapter.keep=0.5", "--adapter.frames=3"),
    ]
    finish([start([*arguments, "--data.batch_size=6"], tmp_path, "one")])
    finish(start_two([*arguments, "--data.batch_size=3"], tmp_path, "two", "lightning"))
    assert_same_losses(tmp_path / "one", tmp_path / "two", 3)
    one, two = (read_adapter(tmp_path / name / "checkpoints/last_adapter.pt") for name in ("one", "two"))
    for name, each in one.maps.items():
        for part in ("left", "right", "left_kept", "right_kept"):
            torch.testing.assert_close(getattr(two.maps[name], part), getattr(each, part), msg=name)


def test_every_launcher_gives_the_same_run(tmp_path: Path, tiny_arguments: list[str]) -> None:
    finish([start([*tiny_arguments, "--data.batch_size=4"], tmp_path, "one")])
    for launcher in LAUNCHERS:
        finish(start_two([*tiny_arguments, "--data.batch_size=2"], tmp_path, launcher, launcher))
        assert_same_losses(tmp_path / "one", tmp_path / launcher, 10)


def test_processes_with_other_data_or_settings_are_refused(
    tmp_path: Path, tiny_arguments: list[str], lmdb_path: Path
) -> None:
    other = write_uneven(lmdb_path, tmp_path / "other.lmdb", SIZES)
    for change, message in (
        (f"--data.train={other}", r"data.train: 6 structures .* in process 1 on .*, but 20 structures"),
        (
            "--model.num_layers=1",
            "model.num_layers: 1 in process 1 on .*, but 2 in process 0 on .*; all processes",
        ),
    ):
        job, name = slurm_job(), f"other{len(message)}"
        arguments = [*tiny_arguments, "--trainer.devices=2"]
        changed = [
            start([*arguments, *own], tmp_path, name, {**job, **slurm_task(rank)})
            for rank, own in enumerate(([], [change]))
        ]
        for error in finish(changed, status=2):
            assert "Traceback" not in error
            assert re.search(message, error), error[-2000:]


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


def test_losses_and_metrics_of_unequal_shares(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", UNEQUAL_SHARES, str(rank), str(tmp_path / "store")], cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(timeout=1800) for process in processes] == [0, 0]

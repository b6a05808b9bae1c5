"""Steps that are not finite: they stop the run with a file to look at, or are left out and counted."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from stand_in import StandIn
from torch import Tensor
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data

from datasets_oc20 import OC20Lmdb
from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.errors import InputError
from equiformer2.training.optim import OptimSettings
from equiformer2.training.task import S2EFTask, TaskSettings


def make_task(folder: Path | None = None, **settings: Any) -> S2EFTask:
    torch.manual_seed(0)
    normalizers = Normalizers(energy=Normalizer(2.5, 0.5), forces=Normalizer(0.0, 0.2))
    optim = OptimSettings(lr=1e-2, warmup_epochs=0.0)
    task = S2EFTask(StandIn(), normalizers, "adsorption", TaskSettings(**settings), optim)
    task.guard.folder = folder
    return task


@pytest.fixture
def batches(lmdb_path: Path) -> list[Batch]:
    """Six batches of two structures."""
    data = OC20Lmdb(lmdb_path, "adsorption")
    return [Batch.from_data_list([data[2 * i], data[2 * i + 1]]) for i in range(6)]


def spoiled(batch: Batch, field: str = "energy") -> Batch:
    """The last structure is not finite."""
    batch = copy.deepcopy(batch)
    batch[field][-1] = float("nan")
    batch.fixed[-1] = False
    return batch


def name_of(batch: Batch, index: int) -> str:
    return f"{batch.sid[index]}/{int(batch.fid[index])}"


class Keep(Callback):
    """Weights, optimizer state and logged values after every step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.momenta: list[Tensor] = []
        self.skipped: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, S2EFTask)
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.model.parameters()]))
        state = trainer.optimizers[0].state.values()
        self.momenta.append(
            torch.cat([torch.zeros(0), *(v.flatten() for each in state for v in each.values())])
        )
        logged = trainer.callback_metrics.get("train/skipped_steps")
        self.skipped.append(float("nan") if logged is None else float(logged))


def fit(task: S2EFTask, batches: list[Batch], **settings: Any) -> Keep:
    keep = Keep()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[keep],
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **settings,
    )
    trainer.fit(task, train_dataloaders=DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return keep


@pytest.mark.parametrize("field", ["energy", "forces", "pos"])
def test_a_loss_that_is_not_finite_stops_the_run(batches: list[Batch], field: str, tmp_path: Path) -> None:
    task, bad = make_task(tmp_path), spoiled(batches[1], field)
    before = copy.deepcopy(fit(make_task(tmp_path), batches[:1]).weights[0])
    with pytest.raises(InputError) as error:
        fit(task, [batches[0], bad, batches[2]])
    path = tmp_path / "non_finite_step1_process0.pt"
    assert str(error.value) == (
        f"the loss is not finite at step 1; look at these structures (sid/fid): {name_of(bad, 1)}; "
        f"the batch is in {path}; if their data are sound, lower optim.lr or use trainer.precision: 32-true"
    )
    # The step did not reach the weights.
    assert torch.equal(torch.cat([p.detach().flatten() for p in task.model.parameters()]), before)
    content = torch.load(path, weights_only=True)
    assert (content["step"], content["what"], content["left_out"]) == (1, "loss", 0)
    first, second = content["structures"]
    assert (first["sid"], second["sid"]) == (bad.sid[1], bad.sid[0])
    sizes = bad.natoms.tolist()
    assert first["predicted"]["forces"].shape == (sizes[1], 3)
    assert first["predicted"]["energy"].shape == (1,)
    again = Batch.from_data_list([Data(**{k: v for k, v in first.items() if k != "predicted"})])
    expected = bad.get_example(1)
    assert torch.equal(again.pos.nan_to_num(), expected.pos.nan_to_num())
    assert torch.equal(again.cell, expected.cell)


def test_a_gradient_that_is_not_finite_stops_the_run(batches: list[Batch], tmp_path: Path) -> None:
    task = make_task(tmp_path)
    task.model.forces.weight.register_hook(lambda gradient: gradient / 0)
    names = f"{name_of(batches[0], 0)}, {name_of(batches[0], 1)};"
    with pytest.raises(InputError, match=f"^the gradient is not finite at step 0; look at .*: {names}"):
        fit(task, batches)
    assert torch.load(tmp_path / "non_finite_step0_process0.pt", weights_only=True)["what"] == "gradient"


def test_steps_are_skipped_and_counted(batches: list[Batch], caplog: pytest.LogCaptureFixture) -> None:
    bad = spoiled(batches[2])
    task = make_task(non_finite="skip")
    keep = fit(task, [*batches[:2], bad, batches[3], spoiled(batches[4]), batches[5]])
    assert keep.skipped == [0, 0, 1, 1, 2, 2]
    changed = [not torch.equal(*pair) for pair in zip(keep.weights, keep.weights[1:], strict=False)]
    assert changed == [True, False, True, False, True]
    moved = [not torch.equal(*pair) for pair in zip(keep.momenta, keep.momenta[1:], strict=False)]
    assert moved == changed
    assert all(torch.isfinite(weights).all() for weights in (*keep.weights, *keep.momenta))
    assert task.averaged is not None
    assert all(torch.isfinite(p).all() for p in task.averaged.parameters())
    assert f"step 2 left out: the loss is not finite; structures (sid/fid): {name_of(bad, 1)}" in caplog.text


def test_too_many_skipped_in_a_row_stop_the_run(batches: list[Batch], tmp_path: Path) -> None:
    task = make_task(tmp_path, non_finite="skip", max_skipped_steps=2)
    sequence = [spoiled(batches[0]), batches[1], *map(spoiled, batches[2:5])]
    with pytest.raises(InputError, match="not finite at step 4, 3 times in a row; look at"):
        fit(task, sequence)
    assert (tmp_path / "non_finite_step4_process0.pt").exists()
    fit(make_task(non_finite="skip", max_skipped_steps=2), sequence[:4])


def test_of_accumulated_batches_the_bad_one_is_named(batches: list[Batch], tmp_path: Path) -> None:
    task = make_task(tmp_path)
    with pytest.raises(InputError, match=f"at step 1; .*: {name_of(batches[2], 1)}; the batch"):
        fit(task, [*batches[:2], spoiled(batches[2]), batches[3]], accumulate_grad_batches=2)
    content = torch.load(tmp_path / "non_finite_step1_process0.pt", weights_only=True)
    assert len(content["structures"]) == 4
    assert [bool(torch.isfinite(torch.tensor(loss))) for loss in content["losses"]] == [False, True]


def test_the_count_is_part_of_a_checkpoint(batches: list[Batch]) -> None:
    task = make_task(non_finite="skip")
    fit(task, [spoiled(batches[0]), batches[1], spoiled(batches[2])])
    state: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(state)
    resumed = make_task(non_finite="skip", max_skipped_steps=1)
    resumed.on_load_checkpoint(state)
    assert float(resumed.guard.skipped) == 2
    with pytest.raises(InputError, match="2 times in a row"):
        fit(resumed, [spoiled(batches[3])])


def test_the_file_is_bounded(batches: list[Batch], tmp_path: Path) -> None:
    bad = spoiled(batches[0])
    task = make_task(tmp_path)
    task.guard.max_atoms = int(bad.natoms[1]) + 1
    with pytest.raises(InputError):
        fit(task, [bad])
    path = tmp_path / "non_finite_step0_process0.pt"
    content = torch.load(path, weights_only=True)
    assert [each["sid"] for each in content["structures"]] == [bad.sid[1]]
    assert content["left_out"] == 1
    assert path.stat().st_size < 100 * int(bad.natoms[1]) + 10_000


def test_without_room_for_the_file_the_reason_is_still_told(batches: list[Batch], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not finite .* could not be written \(.*; if their data"):
        fit(make_task(tmp_path / "missing"), [spoiled(batches[0])])


TWO_PROCESSES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from datasets_oc20 import OC20Lmdb
from torch_geometric.data import Batch
from test_guard import fit, make_task, name_of, spoiled
from tiny_run import LMDB
from equiformer2.errors import InputError

rank, folder = int(sys.argv[2]), Path(sys.argv[3])
data = OC20Lmdb(LMDB, "adsorption")
mine = [Batch.from_data_list([data[4 * i + 2 * rank], data[4 * i + 2 * rank + 1]]) for i in range(5)]
if rank == 1:
    mine[1], mine[3], mine[4] = spoiled(mine[1]), spoiled(mine[3]), spoiled(mine[4])
bad = Batch.from_data_list([data[18], data[19]])
task = make_task(folder, non_finite="skip", max_skipped_steps=1)
message = ""
try:
    fit(task, mine, devices=2, strategy="ddp", use_distributed_sampler=False)
except InputError as error:
    message = str(error)
expected = f"at step 4, 2 times in a row; look at these structures (sid/fid): {name_of(bad, 1)};"
assert expected in message, message
assert float(task.guard.skipped) == 3
torch.save([p.detach() for p in task.model.parameters()], folder / f"{rank}.pt")
"""


@pytest.mark.slow
def test_all_processes_decide_alike(tmp_path: Path) -> None:
    """A structure that only one of them holds is left out, and at last named, by both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).parent
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(here), str(rank), str(tmp_path)],
            cwd=here.parents[1],
            env={**environment, "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.isfinite(value).all() for value in first)
    assert len(list(tmp_path.glob("non_finite_step4_process*.pt"))) == 2

"""The training task: loss, average, randomness, guard, resuming. With a stand-in for the network."""

import copy
import csv
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from stand_in import StandIn
from torch_geometric.data import Batch

from datasets_oc20 import OC20Lmdb
from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.errors import InputError
from equiformer2.graph import radius_graph
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.optim import OptimSettings
from equiformer2.training.resume import ResumeCheckpoint
from equiformer2.training.task import S2EFTask, TaskSettings


def make_task(energy_kind: str = "adsorption", **settings: Any) -> S2EFTask:
    torch.manual_seed(0)
    normalizers = Normalizers(energy=Normalizer(2.5, 0.5), forces=Normalizer(0.0, 0.2))
    optim = OptimSettings(lr=1e-2, warmup_epochs=0.5)
    return S2EFTask(StandIn(), normalizers, energy_kind, TaskSettings(**settings), optim, seed=7)


@pytest.fixture
def batch(lmdb_path: Path) -> Batch:
    data = OC20Lmdb(lmdb_path, "adsorption")
    return Batch.from_data_list([data[0], data[7], data[19]])


class KeepEvery(ResumeCheckpoint):
    """Keeps a copy of every checkpoint."""

    def _save(self, trainer: pl.Trainer) -> None:
        super()._save(trainer)
        when = "validation" if trainer.validating else "batch"
        shutil.copy(self.path, self.path.with_name(f"{when}{trainer.global_step}.ckpt"))


def fit(folder: Path, lmdb_path: Path, resume: Path | None = None, **trainer_settings: Any) -> S2EFTask:
    task = make_task()
    data = ResumableDataModule(
        train=str(lmdb_path), val=str(lmdb_path), energy_kind="adsorption", batch_size=3, seed=7
    )
    trainer = pl.Trainer(
        max_epochs=trainer_settings.pop("max_epochs", 3),
        accelerator="cpu",
        callbacks=[
            KeepEvery(folder / "last.ckpt", every_n_steps=2),
            *trainer_settings.pop("more_callbacks", []),
        ],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer_settings,
    )
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    return task


def losses(folder: Path) -> dict[str, str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {row["step"]: row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"max_epochs": 2}, ["batch2", "validation7", "batch10"]),
        ({"max_epochs": 2, "limit_train_batches": 4}, ["validation4"]),
        *(
            pytest.param(settings, places, marks=pytest.mark.slow)
            for settings, places in (
                ({"max_epochs": 2, "accumulate_grad_batches": 2}, ["batch2", "validation4", "batch6"]),
                ({"max_epochs": 2, "val_check_interval": 3}, ["validation3", "batch4", "validation10"]),
                ({"max_epochs": -1, "max_steps": 10}, ["batch4", "validation7"]),
            )
        ),
    ],
    ids=["plain", "limited epochs", "accumulation", "validation in mid-epoch", "limited by steps"],
)
def test_resuming_repeats_the_uninterrupted_run(
    tmp_path: Path, lmdb_path: Path, settings: dict[str, Any], places: list[str]
) -> None:
    whole = fit(tmp_path / "whole", lmdb_path, **settings)
    expected = losses(tmp_path / "whole")
    for place in places:
        resumed = fit(tmp_path / place, lmdb_path, tmp_path / "whole" / f"{place}.ckpt", **settings)
        found = losses(tmp_path / place)
        assert len(found) == len(expected) - int("".join(filter(str.isdigit, place)))
        assert found == {step: expected[step] for step in found}
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (place, name)


@pytest.mark.filterwarnings("ignore")
def test_resuming_with_other_data_units_is_refused(tmp_path: Path, lmdb_path: Path) -> None:
    fit(tmp_path / "whole", lmdb_path, limit_train_batches=2)
    state = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    make_task().on_load_checkpoint(state)
    with pytest.raises(InputError, match="energy_kind 'adsorption', this one has 'total'"):
        make_task(energy_kind="total").on_load_checkpoint(state)
    other = make_task()
    other.normalizers = Normalizers(energy=Normalizer(0.0, 1.0), forces=Normalizer(0.0, 1.0))
    with pytest.raises(InputError, match="other normalizers"):
        other.on_load_checkpoint(state)
    other = make_task()
    other.model.energy = torch.nn.Linear(5, 1)
    with pytest.raises(InputError, match=r"another model: 1 tensors .* the first is model\.energy\.weight"):
        other.on_load_checkpoint(state)


def training_loss(task: S2EFTask, batch: Batch) -> torch.Tensor:
    task._log_training = lambda *_: None  # type: ignore[method-assign]
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    task.trainer = trainer
    return task.training_step(batch, batch_idx=0)


def test_the_loss_is_the_papers(batch: Batch) -> None:
    task = make_task(energy_coefficient=4.0, force_coefficient=100.0).eval()
    out = task.model(batch)
    energy = (out["energy"] - (batch.energy - 2.5) / 0.5).abs().mean()
    forces = (out["forces"] - batch.forces / 0.2)[~batch.fixed].norm(dim=1).mean()
    torch.testing.assert_close(training_loss(task, batch), (4 * energy + 100 * forces).float())


def test_dropout_is_a_function_of_the_seed_and_leaves_the_global_state(batch: Batch) -> None:
    task = make_task()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = training_loss(task, batch)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(training_loss(task, batch), first)
    task.seed = 8
    assert not torch.equal(training_loss(task, batch), first)


def test_validation_uses_the_averaged_weights(batch: Batch) -> None:
    task = make_task()
    expected = task.validation_step(batch, 0)
    with torch.no_grad():
        task.model.forces.weight.fill_(100.0)
    torch.testing.assert_close(task.validation_step(batch, 0), expected)
    task.train()
    assert task.model.training
    assert task.averaged is not None
    assert not task.averaged.training


def test_without_an_average_validation_uses_the_raw_weights() -> None:
    task = make_task(ema_decay=0.0)
    assert task.best_weights is task.model
    assert not any("averaged" in name for name in task.state_dict())


def test_activation_checkpointing_is_passed_on() -> None:
    task = make_task(activation_checkpointing=True)
    assert task.model.activation_checkpointing is True


@pytest.mark.parametrize(("backend", "logged"), [("compile", 6.0), ("torch", None)])
def test_the_number_of_compiled_graphs_is_logged(backend: str, logged: float | None) -> None:
    task = make_task(backend=backend)
    for network in (task.model, task.averaged):
        network.compiled_graphs = 3
    values: dict[str, Any] = {}
    task._trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    task.log = lambda name, value, **_: values.update({name: value})  # type: ignore[method-assign]
    task.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    task._log_training(torch.tensor(1.0), {"train/energy_mae": torch.tensor(1.0)}, 3)
    assert values.get("train/compiled_graphs") == logged


class StandInWithGraph(StandIn):
    """Refuses what the network's graph refuses."""

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        radius_graph(
            batch.pos, batch.cell, batch.pbc, batch.natoms, max_radius=3.0, max_neighbors=5, strict=True
        )
        return super().forward(batch)


@pytest.mark.parametrize("step", ["training", "validation"])
def test_a_structure_without_a_graph_is_named(batch: Batch, step: str) -> None:
    task = make_task(ema_decay=0.0)
    task.model = StandInWithGraph()
    spoiled = copy.deepcopy(batch)
    first = int(batch.natoms[0])
    spoiled.pos[first + 5] = spoiled.pos[first + 2]
    name = f"{batch.sid[1]}/{int(batch.fid[1])}"
    message = rf"structure {name} \(sid/fid\): atoms 2 and 5 of structure 1 of the batch are 0 Å apart"
    with pytest.raises(InputError, match=message):
        training_loss(task, spoiled) if step == "training" else task.validation_step(spoiled, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_has_the_optimizer_settings_that_it_is_given(tmp_path: Path, lmdb_path: Path) -> None:
    class Slower(pl.Callback):
        """What a user changes after a run has diverged."""

        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            assert isinstance(pl_module, S2EFTask)
            pl_module.optim = replace(pl_module.optim, lr=1e-4, weight_decay=0.5, betas=(0.8, 0.9))

    class Seen(pl.Callback):
        """What the optimizer has in every step."""

        groups: ClassVar[list[list[dict[str, Any]]]] = []

        def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
        ) -> None:
            names = ("lr", "initial_lr", "weight_decay", "betas")
            self.groups.append([{name: g[name] for name in names} for g in optimizer.param_groups])

    fit(tmp_path / "whole", lmdb_path, limit_train_batches=4)
    last = tmp_path / "whole" / "batch2.ckpt"
    old = torch.load(last, weights_only=True)["optimizer_states"][0]["param_groups"]
    fit(tmp_path / "slower", lmdb_path, last, limit_train_batches=4, more_callbacks=[Slower(), Seen()])
    decayed, other = Seen.groups[0]
    assert decayed["initial_lr"] == other["initial_lr"] == 1e-4
    assert decayed["lr"] == pytest.approx(old[0]["lr"] * 1e-2, rel=1e-9)
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.5, 0.0)
    assert decayed["betas"] == (0.8, 0.9)
    assert all(groups[0]["lr"] <= 1e-4 for groups in Seen.groups)

"""Gradient accumulation is one large batch."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from stand_in import StandIn
from torch_geometric.data import Batch, Data
from uneven import write_uneven

from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.training.folder import read_rows
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.losses import Terms, with_terms
from equiformer2.training.optim import OptimSettings
from equiformer2.training.task import S2EFTask, TaskSettings

SIZES = [12, 33, 7, 29, 21, 5, 28, 31, 9, 17, 30, 14, 25, 8]


def fit(folder: Path, lmdb: Path, batch_size: int, together: int, **limits: Any) -> S2EFTask:
    torch.manual_seed(0)
    model = StandIn()
    model.drop = torch.nn.Identity()  # a function of the micro-batch
    normalizers = Normalizers(energy=Normalizer(2.5, 0.5), forces=Normalizer(0.0, 0.2))
    task = S2EFTask(model, normalizers, "adsorption", TaskSettings(), OptimSettings(lr=1e-2), seed=7)
    data = ResumableDataModule(
        train=str(lmdb), val=str(lmdb), energy_kind="adsorption", batch_size=batch_size, seed=7
    )
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        accumulate_grad_batches=together,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        **limits,
    )
    trainer.fit(task, datamodule=data)
    return task


def logged(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_rows(folder / "metrics.csv") if row[name]]


@pytest.mark.filterwarnings("ignore")
def test_accumulation_equals_the_large_batch(tmp_path: Path, lmdb_path: Path) -> None:
    # Steps of 6, 6 and 2 structures: the last of an epoch has one micro-batch instead of three.
    lmdb = write_uneven(lmdb_path, tmp_path / "uneven.lmdb", SIZES)
    large = fit(tmp_path / "large", lmdb, 6, 1)
    small = fit(tmp_path / "small", lmdb, 2, 3)
    assert large.global_step == small.global_step == 9
    for name in ("train/loss", "train/energy_mae", "train/forces_l2", "train/grad_norm"):
        expected, found = logged(tmp_path / "large", name), logged(tmp_path / "small", name)
        assert found == pytest.approx(expected, rel=1e-6), name
    for name, value in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_cut_short_ends_with_a_step_of_what_there_is(tmp_path: Path, lmdb_path: Path) -> None:
    seen: list[float] = []

    class Note(pl.Callback):
        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Batch, number: int
        ) -> None:
            seen.append(3 * Terms.from_batch(batch).energies)

    lmdb = write_uneven(lmdb_path, tmp_path / "uneven.lmdb", SIZES)
    task = fit(tmp_path / "cut", lmdb, 2, 3, limit_train_batches=4, callbacks=[Note()])
    assert seen == pytest.approx(3 * [6, 6, 6, 2])
    assert task.global_step == 6


def batches(count: int) -> list[Batch]:
    return [
        Batch.from_data_list([Data(pos=torch.zeros(4, 3), fixed=torch.arange(4) >= number % 5)])
        for number in range(count)
    ]


def test_the_terms_of_a_step_are_counted_ahead() -> None:
    taken: list[int] = []

    def source() -> Any:
        for number, batch in enumerate(batches(7)):
            taken.append(number)
            yield batch

    found, read = [], []
    for batch in with_terms(source(), first=0, together=3, last=7):
        found.append(Terms.from_batch(batch))
        read.append(len(taken))
    assert [terms.free_atoms * 3 for terms in found] == pytest.approx([3, 3, 3, 7, 7, 7, 1])
    assert [terms.energies * 3 for terms in found] == pytest.approx([3, 3, 3, 3, 3, 3, 1])
    assert read == [3, 4, 5, 6, 7, 7, 7]  # spread out, so that loader processes work on


def test_steps_are_counted_from_the_beginning_of_the_epoch() -> None:
    def free(first: int, last: int) -> list[float]:
        found = with_terms(batches(7)[first:], first=first, together=3, last=last)
        return [3 * Terms.from_batch(batch).free_atoms for batch in found]

    assert free(2, 7) == pytest.approx([2, 7, 7, 7, 1])
    assert free(3, 5) == pytest.approx([7, 7])
    assert free(0, 7)[3:] == free(3, 7)


def test_structures_without_an_energy_do_not_count() -> None:
    data = batches(2)
    for number, batch in enumerate(data):
        batch.has_energy = torch.tensor([number == 1])
    assert [2 * Terms.from_batch(batch).energies for batch in with_terms(data, 0, 2, 2)] == [1, 1]
    assert Terms.from_batch(data[0].clone().to("cpu")) == Terms.from_batch(data[1])
    assert Terms.from_batch(batches(1)[0]) is None

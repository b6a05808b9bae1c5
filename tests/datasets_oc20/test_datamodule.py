"""The data module under a Trainer, and what it refuses before the first step."""

import logging
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from oc20_files import structure
from torch_geometric.data import Batch

from datasets_oc20 import DataError, LmdbWriter, OC20DataModule, OC20Lmdb
from datasets_oc20.datamodule import NormalizerValues, collate
from datasets_oc20.targets import fit_linear_references, fit_normalizers


def write(path: Path, kind: str | None, count: int = 10, scale: float = 1.0, natoms: int = 4) -> str:
    with LmdbWriter(path, kind) as writer:
        for seed in range(count):
            writer.write(structure(natoms=natoms + seed % 3, energy=scale * (seed - 3.0), seed=seed))
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "train.lmdb", "adsorption")


@pytest.fixture
def val(tmp_path: Path) -> str:
    return write(tmp_path / "val.lmdb", "adsorption", count=5)


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[list[int]]] = {}
        self.validated: list[int] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch.fid.tolist())
        return self.weight.sum()

    def validation_step(self, batch: Batch, index: int) -> None:
        self.validated += batch.fid.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(**options) -> Recorder:
    model = Recorder()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=OC20DataModule(**options))
    return model


def test_two_epochs_of_training(train: str, val: str) -> None:
    model = fit(train=train, val=val, batch_size=4, max_atoms=15, seed=3)
    for epoch in (0, 1):
        assert sorted(index for batch in model.seen[epoch] for index in batch) == list(range(10))
    assert model.seen[0] != model.seen[1]
    assert model.validated == [0, 1, 2, 3, 4] * 2
    assert fit(train=train, val=val, batch_size=4, max_atoms=15, seed=3, num_workers=1).seen == model.seen
    assert fit(train=train, val=val, batch_size=4, max_atoms=15, seed=4).seen != model.seen


def test_normalizers_come_from_the_training_data(train: str, val: str) -> None:
    module = OC20DataModule(train=train, val=val)
    module.setup()
    expected = fit_normalizers(OC20Lmdb(train))
    assert module.energy_kind == "adsorption"
    assert module.normalizers == {**expected, "linear_references": None}


def test_total_energies_get_linear_references(tmp_path: Path) -> None:
    train = write(tmp_path / "train.lmdb", "total", scale=100.0)
    module = OC20DataModule(train=train, val=train)
    module.setup()
    references = fit_linear_references(OC20Lmdb(train))
    torch.testing.assert_close(module.normalizers["linear_references"], references)
    assert module.normalizers["energy"] == fit_normalizers(OC20Lmdb(train), references)["energy"]


def test_given_normalizers_are_used(tmp_path: Path, train: str) -> None:
    np.savez(tmp_path / "linref.npz", coeff=np.arange(100.0))
    values = NormalizerValues(-0.75, 2887.0, 2.5, str(tmp_path / "linref.npz"))
    adsorption, train = train, write(tmp_path / "total.lmdb", "total", scale=100.0)
    val = train
    module = OC20DataModule(train=train, val=val, normalizers=values)
    module.setup()
    assert module.normalizers["energy"] == (-0.75, 2887.0)
    assert module.normalizers["forces"] == (0.0, 2.5)
    assert module.normalizers["linear_references"].tolist() == list(range(100))
    with pytest.raises(DataError, match=r"linref\.npz .*total energies"):
        OC20DataModule(train=adsorption, val=adsorption, normalizers=values).setup()
    with pytest.raises(DataError, match="standard deviations from the mean"):
        OC20DataModule(train=train, val=val, normalizers=NormalizerValues(-0.755, 2.887, 2.5)).setup()
    for coefficients in (np.arange(50.0), np.full(100, np.nan)):
        np.savez(tmp_path / "linref.npz", coeff=coefficients)
        with pytest.raises(DataError, match=r"linref\.npz: 'coeff' must hold 100 finite"):
            OC20DataModule(train=train, val=val, normalizers=values).setup()
    (tmp_path / "linref.npz").write_text("no")
    with pytest.raises(DataError, match=r"linref\.npz: not a whole \.npz"):
        OC20DataModule(train=train, val=val, normalizers=values).setup()
    with pytest.raises(DataError, match="must be positive"):
        OC20DataModule(train=train, val=val, normalizers=NormalizerValues(0.0, 0.0, 1.0)).setup()


def test_what_was_found_is_said(train: str, val: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        OC20DataModule(train=train, val=val).setup()
    assert "train 10, val 5 records, adsorption energies; training targets: energy " in caplog.text


def test_several_training_files(train: str, val: str) -> None:
    module = OC20DataModule(train=[train, val], val=val, test=val, batch_size=4)
    module.setup()
    assert sum(batch.num_graphs for batch in module.train_dataloader()) == 15
    assert sum(batch.num_graphs for batch in module.test_dataloader()) == 5


def test_oc20s_own_files_need_the_kind(val_20: Path, train: str) -> None:
    with pytest.raises(DataError, match=r"val_20\.lmdb: .*set data\.energy_kind"):
        OC20DataModule(train=train, val=str(val_20)).setup()
    module = OC20DataModule(train=str(val_20), val=str(val_20), energy_kind="adsorption", max_atoms=99)
    module.setup()
    assert [batch.num_graphs for batch in module.val_dataloader()] == [3] * 6 + [2]


def test_mixed_kinds_are_refused(tmp_path: Path, train: str, val: str) -> None:
    total = write(tmp_path / "total.lmdb", "total", scale=100.0)
    with pytest.raises(DataError, match=r"train adsorption, val total"):
        OC20DataModule(train=train, val=total).setup()
    with pytest.raises(DataError, match="mix adsorption and total"):
        OC20DataModule(train=[train, total], val=val).setup()
    with pytest.raises(DataError, match=r"total\.lmdb: the file declares total"):
        OC20DataModule(train=total, val=total, energy_kind="adsorption").setup()


def test_wrongly_declared_energies_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "wrong.lmdb", "adsorption", scale=100.0)
    with pytest.raises(DataError, match=r"wrong\.lmdb: declared as adsorption"):
        OC20DataModule(train=path, val=path).setup()


@pytest.mark.parametrize("wrong", [{"max_neighbors": 0}, {"num_workers": -1}])
def test_numbers_out_of_range_are_named(train: str, val: str, wrong: dict) -> None:
    with pytest.raises(DataError, match=f"data.{next(iter(wrong))}"):
        OC20DataModule(train=train, val=val, **wrong)


def test_no_test_data(train: str, val: str) -> None:
    module = OC20DataModule(train=train, val=val)
    module.setup()
    with pytest.raises(DataError, match=r"data\.test is not set"):
        module.test_dataloader()


def test_structures_larger_than_a_batch(train: str, val: str) -> None:
    module = OC20DataModule(train=train, val=val, max_atoms=5)
    module.setup()
    with pytest.raises(DataError, match="record 2 has 6 atoms, more than the 5"):
        module.train_dataloader()


def test_records_with_different_fields_are_not_collated() -> None:
    whole, bare = structure(seed=0), structure(seed=1)
    del bare["forces"]
    for pair in ([whole, bare], [bare, whole]):
        with pytest.raises(DataError, match="only one has forces"):
            collate(pair)
        collate(pair[1:])
        with pytest.raises(DataError, match="only one has forces"):
            collate(pair[1:], like=pair[0])


def test_without_validation_data_systems_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "own.lmdb"
    with LmdbWriter(path, "adsorption") as writer:
        for number in range(20):
            data = structure(natoms=4, energy=0.1 * number, seed=number)
            data.sid, data.fid = f"system{number // 4}", number
            writer.write(data)
    module = OC20DataModule(str(path), batch_size=4)
    module.setup("fit")
    train, val = module.datasets["train"], module.datasets["val"]
    systems = [{data.sid for data in (part[i] for i in range(len(part)))} for part in (train, val)]
    assert not systems[0] & systems[1]
    assert (len(train), len(val)) == (16, 4)
    assert len(train.natoms) == 16
    assert train.describe(0).startswith(str(path))
    fids = {fid for batch in module.train_dataloader() for fid in batch.fid.tolist()}
    assert fids == {train[i].fid for i in range(16)}

"""Denoising as an auxiliary task: what is corrupted, what is learned, what a run leaves, how it resumes."""

import csv
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger
from stand_in import StandIn
from test_task import KeepEvery, training_loss
from torch import Tensor
from torch_geometric.data import Batch

from datasets_oc20 import OC20Lmdb
from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint
from equiformer2.errors import InputError
from equiformer2.model.denoising import EncodedForces
from equiformer2.training.configuration import parse
from equiformer2.training.corruption import DensSettings, corrupt
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.optim import OptimSettings
from equiformer2.training.run import train
from equiformer2.training.task import S2EFTask, TaskSettings


@pytest.fixture
def batch(lmdb_path: Path) -> Batch:
    data = OC20Lmdb(lmdb_path, "adsorption")
    return Batch.from_data_list([data[index] for index in range(8)])


class NoisyStandIn(StandIn):
    """Predicts noise from what it is told of forces and from positions."""

    def __init__(self) -> None:
        super().__init__()
        self.config.dens = True
        self.noise = torch.nn.Linear(6, 3)
        self.told: list[EncodedForces | None] = []

    def forward(self, batch: object, dens: EncodedForces | None = None) -> dict[str, Tensor]:
        out = super().forward(batch)
        self.told.append(dens)
        if dens is not None:
            forces = torch.where(dens.atoms[:, None], dens.forces, 0.0)
            out["noise"] = self.noise(torch.cat((batch.pos.float() / 10, forces), dim=1))
        return out


def make_task(**settings: object) -> S2EFTask:
    torch.manual_seed(0)
    normalizers = Normalizers(energy=Normalizer(2.5, 0.5), forces=Normalizer(0.0, 0.2))
    return S2EFTask(
        NoisyStandIn(),
        normalizers,
        "adsorption",
        TaskSettings(dens=DensSettings(**settings)),
        OptimSettings(lr=1e-2, warmup_epochs=0.5),
        seed=7,
    )


def test_only_free_atoms_of_chosen_structures_move(batch: Batch) -> None:
    before = batch.clone()
    settings = DensSettings(probability=0.5, corrupted_fraction=0.4, noise_std=0.2)
    found = corrupt(batch, settings, seed=5)
    moved = (found.batch.pos != batch.pos).any(dim=1)
    atoms = found.encoded.atoms
    assert torch.equal(moved, atoms)
    assert not (atoms & batch.fixed).any()
    inside = torch.zeros(8, dtype=torch.long).index_add(0, batch.batch, atoms.long())
    assert torch.equal(inside > 0, found.structures)
    assert 0 < found.structures.sum() < 8
    torch.testing.assert_close(found.batch.pos, batch.pos + 0.2 * found.target)
    # Periodic structures: positions move, cells do not; targets are those of the original.
    for name in ("cell", "pbc", "energy", "forces", "fixed", "atomic_numbers"):
        assert torch.equal(found.batch[name], before[name])
    assert torch.equal(batch.pos, before.pos)
    assert torch.equal(found.encoded.forces, before.forces)
    assert torch.equal(corrupt(batch, settings, seed=5).target, found.target)
    assert not torch.equal(corrupt(batch, settings, seed=6).target, found.target)


def test_shares_and_size_of_the_noise(batch: Batch) -> None:
    settings = DensSettings(probability=0.25, corrupted_fraction=0.4)
    draws = [corrupt(batch, settings, seed) for seed in range(200)]
    chosen = torch.stack([draw.structures for draw in draws])
    atoms = torch.stack([draw.encoded.atoms for draw in draws])
    assert chosen.float().mean() == pytest.approx(0.25, abs=0.05)
    free = (~batch.fixed).expand_as(atoms) & chosen[:, batch.batch]
    assert atoms[free].float().mean() == pytest.approx(0.4, abs=0.05)
    noise = torch.stack([draw.target for draw in draws])[atoms]
    assert noise.mean() == pytest.approx(0.0, abs=0.1)
    assert noise.std() == pytest.approx(1.0, abs=0.1)
    assert not any(draw.nowhere and draw.structures.any() for draw in draws)
    whole = corrupt(batch, DensSettings(probability=1.0, corrupted_fraction=1.0), 0)
    assert torch.equal(whole.encoded.atoms, ~batch.fixed)


@pytest.mark.parametrize("original_targets", [True, False])
def test_the_loss_is_that_of_the_paper(batch: Batch, original_targets: bool) -> None:
    """Energy of the original, forces on atoms in place and noise of the others, means over all free atoms."""
    task = make_task(coefficient=15.0, original_targets=original_targets)
    loss = training_loss(task.eval(), batch)
    noisy = task._corrupted(batch, 0)
    assert noisy is not None
    assert 0 < noisy.structures.sum() < 8
    told = task.model.told[0]
    assert torch.equal(told.atoms, noisy.encoded.atoms)
    out = task.model(noisy.batch, dens=noisy.encoded)
    energy = (out["energy"] - (batch.energy.view(-1) - 2.5) / 0.5).abs()
    force = torch.linalg.vector_norm(out["forces"] - batch.forces / 0.2, dim=1)
    noise = torch.linalg.vector_norm(out["noise"] - noisy.target, dim=1)
    free = (~batch.fixed).sum()
    left, spared = ~batch.fixed & ~noisy.encoded.atoms, torch.ones(8, dtype=torch.bool)
    if not original_targets:
        spared = ~noisy.structures
        left = left & spared[batch.batch]
    expected = 2 * energy[spared].sum() / 8 + 100 * force[left].sum() / free
    expected = expected + 15 * noise[noisy.encoded.atoms].sum() / free
    torch.testing.assert_close(loss, expected.float())  # the data's energies are float64


def test_a_batch_without_corrupted_structures_costs_nothing(batch: Batch) -> None:
    found = corrupt(batch, DensSettings(probability=1e-9), 0)
    model = NoisyStandIn().eval()
    out = found.predict(model)
    assert model.told == [None]
    assert not out["noise"].any()


def fit(folder: Path, lmdb_path: Path, resume: Path | None = None) -> S2EFTask:
    task = make_task(probability=0.7)
    data = ResumableDataModule(
        train=str(lmdb_path), val=str(lmdb_path), energy_kind="adsorption", batch_size=3, seed=7
    )
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[KeepEvery(folder / "last.ckpt", every_n_steps=2)],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    return task


def rows(folder: Path) -> dict[str, tuple[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {row["step"]: (row["train/loss"], row["train/denoising_l2"]) for row in found}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_resuming_repeats_the_noise(tmp_path: Path, lmdb_path: Path) -> None:
    whole = fit(tmp_path / "whole", lmdb_path)
    expected = rows(tmp_path / "whole")
    assert len({noise for _, noise in expected.values()}) == len(expected) == 14
    for place in ("batch2", "validation7", "batch10"):
        resumed = fit(tmp_path / place, lmdb_path, tmp_path / "whole" / f"{place}.ckpt")
        found = rows(tmp_path / place)
        assert found == {step: expected[step] for step in found}
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (place, name)


TINY = ModelConfig(
    num_layers=1,
    lmax=1,
    mmax=1,
    sphere_channels=8,
    attn_hidden_channels=8,
    num_heads=2,
    attn_alpha_channels=4,
    attn_value_channels=4,
    ffn_hidden_channels=8,
    edge_channels=8,
    grid_resolution=6,
    num_distance_basis=16,
    max_radius=4.0,
    max_neighbors=8,
    alpha_drop=0.0,
    drop_path_rate=0.0,
    dens=True,
)


@pytest.mark.slow
def test_the_noise_of_a_few_structures_is_learned(batch: Batch) -> None:
    torch.manual_seed(1)
    model = EquiformerV2(TINY)
    noisy = corrupt(batch, DensSettings(probability=0.5), seed=2)
    atoms = noisy.encoded.atoms
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    errors = []
    for _ in range(60):
        error = torch.linalg.vector_norm(noisy.predict(model)["noise"] - noisy.target, dim=1)[atoms].mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]
    assert errors[-1] < 0.6 * torch.linalg.vector_norm(noisy.target, dim=1)[atoms].mean()


@pytest.mark.slow
def test_a_run_leaves_and_starts_from_ordinary_checkpoints(tmp_path: Path, tiny_arguments: list[str]) -> None:
    arguments = [*tiny_arguments, f"--runs_dir={tmp_path}", "--trainer.max_steps=2"]
    folder = train(parse([*arguments, "--name=dens", "--task.dens.noise_std=0.15"]))
    values = yaml.safe_load((folder / "config.yaml").read_text())
    assert values["model"]["dens"] is True
    assert values["task"]["dens"] == vars(DensSettings(noise_std=0.15))
    exported = folder / "checkpoints" / "last.pt"
    checkpoint = load_checkpoint(exported)
    assert checkpoint.config.dens is False
    assert not [name for name in checkpoint.model.state_dict() if name.startswith("dens.")]
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in load_checkpoint(exported, weights="raw").model.state_dict().items():
        assert torch.equal(state[f"model.{name}"], value)
    assert any(name.startswith("averaged.dens.head.") for name in state)

    start = f"--init_from={exported}"
    plain = train(parse([*arguments, "--name=plain", start]))
    assert yaml.safe_load((plain / "config.yaml").read_text())["model"]["dens"] is False
    train(parse([*arguments, "--name=again", start, "--task.dens.probability=0.25"]))
    resumed = [f"--config={folder / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_steps=3"]
    train(parse(resumed))
    assert len(rows(folder)) == 3


def test_settings_that_cannot_be_are_refused(tmp_path: Path, tiny_arguments: list[str]) -> None:
    with pytest.raises(InputError, match=r"task\.dens\.probability is 1\.5"):
        parse([*tiny_arguments, "--task.dens.probability=1.5"])
    with pytest.raises(InputError, match=r"did you mean 'task\.dens\.noise_std'"):
        parse([*tiny_arguments, "--task.dens.noise_sd=0.1"])
    with pytest.raises(InputError, match="compile encodes no forces"):
        parse([*tiny_arguments, "--task.dens.noise_std=0.1", "--task.backend=compile"])
    runs = f"--runs_dir={tmp_path}"
    with pytest.raises(InputError, match=r"model\.dens is for task\.dens"):
        train(parse([*tiny_arguments, runs, "--model.dens=true"]))
    with pytest.raises(InputError, match=r"model\.dens needs model\.forces: direct"):
        train(parse([*tiny_arguments, runs, "--model.forces=none", "--task.dens.noise_std=0.1"]))

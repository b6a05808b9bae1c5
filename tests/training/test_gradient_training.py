"""Training networks whose forces are the gradient of their energy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import Tensor

from datasets_oc20 import LmdbWriter
from datasets_oc20.structure_record import make_data
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.inference.atoms import atoms_to_data
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.training.configuration import parse
from equiformer2.training.folder import read_rows
from equiformer2.training.losses import stress_l1
from equiformer2.training.optim import OptimSettings
from equiformer2.training.run import train
from equiformer2.training.task import S2EFTask, TaskSettings


@pytest.fixture(scope="module")
def strained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crystals labelled by a pair potential: energies, their forces and stress; made, not measured."""
    path = tmp_path_factory.mktemp("strained") / "data.lmdb"
    with LmdbWriter(path, "total", {"source": "a pair potential"}) as writer:
        for seed in range(8):
            atoms = bulk("Cu", cubic=True, a=3.4 + 0.05 * seed)
            atoms.rattle(0.1, seed=seed)
            data = atoms_to_data(atoms, notify=False)
            fields = data.to_dict() | _labels(data.pos.double(), data.cell.double())
            writer.write(make_data(fields | {"sid": f"crystal{seed}", "fid": 0}, "test"))
    return path


def _labels(pos: Tensor, cell: Tensor) -> dict[str, Tensor]:
    shifts = torch.cartesian_prod(*[torch.arange(-1.0, 2.0, dtype=torch.float64)] * 3)
    pos = pos.requires_grad_()
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    stretch = torch.eye(3, dtype=torch.float64) + 0.5 * (strain + strain.T)
    vectors = (pos[None, :, None] - pos[None, None, :] + (shifts @ cell[0])[:, None, None]) @ stretch
    square = vectors.square().sum(-1).flatten()
    energy = 3 * torch.exp(-square[square > 0.1] / 4).sum()
    gradient, virial = torch.autograd.grad(energy, [pos, strain])
    volume = cell[0].det().abs()
    return {"energy": energy.detach()[None], "forces": -gradient, "stress": virial[None] / volume}


def arguments(data: Path, runs: Path, name: str, *more: str) -> list[str]:
    return [
        *(f"--data.{split}={data}" for split in ("train", "val")),
        *("--data.energy_kind=total", "--data.batch_size=4", "--seed=1"),
        *("--model.num_layers=1", "--model.lmax=1", "--model.mmax=1", "--model.sphere_channels=8"),
        *("--model.attn_hidden_channels=8", "--model.num_heads=2", "--model.attn_alpha_channels=4"),
        *("--model.attn_value_channels=4", "--model.ffn_hidden_channels=8", "--model.edge_channels=8"),
        *("--model.grid_resolution=6", "--model.num_distance_basis=16", "--model.max_radius=4"),
        *("--model.avg_num_nodes=4", "--model.drop_path_rate=0", "--model.alpha_drop=0"),
        *("--optim.lr=1e-2", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
        *(f"--runs_dir={runs}", f"--name={name}", *more),
    ]


GRADIENT = ("--model.forces=gradient", "--model.stress=true")


@pytest.mark.filterwarnings("ignore")
def test_energies_forces_and_stress_are_trained_together(strained: Path, tmp_path: Path) -> None:
    more = (*GRADIENT, "--task.stress_coefficient=10", "--trainer.max_epochs=6", "--task.ema_decay=0.9")
    folder = train(parse(arguments(strained, tmp_path, "all", *more)))
    rows = read_rows(folder / "metrics.csv")
    for name in (
        "train/energy_mae",
        "train/forces_l2",
        "train/stress_mae",
        "val/forces_mae",
        "val/energy_mae",
    ):
        assert all(np.isfinite(float(row[name])) for row in rows if row[name]), name
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert losses[-1] < losses[0]
    loaded = load_checkpoint(folder / "checkpoints/best.pt")
    assert loaded.config.forces == "gradient"
    assert loaded.normalizers.forces.std == loaded.normalizers.energy.std
    assert {"energy", "forces", "stress"} == set(
        Predictor(loaded).predict(atoms_to_data(bulk("Cu", cubic=True), notify=False))
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_direct_network_is_tuned_for_gradient_forces(strained: Path, tmp_path: Path) -> None:
    short = ("--trainer.max_epochs=1", "--optim.lr=1e-9", "--task.ema_decay=0")
    start = train(parse(arguments(strained, tmp_path, "start", *short))) / "checkpoints/last.pt"
    tuned = train(parse(arguments(strained, tmp_path, "tuned", *short, *GRADIENT, f"--init_from={start}")))
    before, after = load_checkpoint(start), load_checkpoint(tuned / "checkpoints/last.pt")
    data = atoms_to_data(bulk("Cu", cubic=True), notify=False)
    energies = [Predictor(each).predict(data)["energy"].item() for each in (before, after)]
    assert energies[0] == pytest.approx(energies[1], rel=1e-5)
    back = arguments(strained, tmp_path, "back", f"--init_from={tuned}/checkpoints/last.pt")
    with pytest.raises(InputError, match=r"model\.forces is 'gradient' there and 'direct' here"):
        train(parse(back))


@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_before_the_first_step(strained: Path, lmdb_path: Path, tmp_path: Path) -> None:
    cases = {
        "the backend 'compile' cannot be differentiated twice": ("--task.backend=compile", *GRADIENT),
        "has no derivatives with respect to the edge frames": ("--task.backend=cpp", *GRADIENT),
        "task.stress_coefficient needs model.stress": ("--task.stress_coefficient=1",),
        "data.normalizers: the forces of this model are the gradient of its energy, so their std must be": (
            *GRADIENT,
            "--data.normalizers.energy_mean=30",
            "--data.normalizers.energy_std=10",
            "--data.normalizers.forces_std=1",
        ),
    }
    for number, (message, more) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            train(parse(arguments(strained, tmp_path, f"refused{number}", *more)))
    more = (*GRADIENT, "--task.stress_coefficient=1", "--data.energy_kind=adsorption")
    with pytest.raises(InputError, match="the record has no stress to train on"):
        train(parse(arguments(lmdb_path, tmp_path, "no_stress", *more)))


def test_older_configurations_train_what_they_said(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model:\n  regress_forces: false\n")
    found = parse([f"--config={file}", "--data.train=x", "--data.val=x"])
    assert found.model.forces == "none"
    assert "regress_forces" not in found.text
    with pytest.raises(InputError, match="regress_forces = False contradicts"):
        parse([f"--config={file}", "--model.forces=gradient", "--data.train=x", "--data.val=x"])


def test_the_stress_loss_leaves_out_what_has_no_volume() -> None:
    prediction = torch.full((3, 3, 3), 2.0)
    prediction[1] = torch.nan
    prediction.requires_grad_()
    target, periodic = torch.zeros(3, 3, 3), torch.tensor([True, False, True])
    loss = stress_l1(prediction, target, periodic)
    loss.backward()
    assert loss.item() == 2.0
    assert prediction.grad[:, 0, 0].tolist() == pytest.approx([1 / 18, 0, 1 / 18])
    assert stress_l1(prediction, target, periodic, terms=4.0).item() == 1.0


def test_normalizers_of_gradient_forces() -> None:
    config = ModelConfig(
        num_layers=1, lmax=1, mmax=1, sphere_channels=4, grid_resolution=6, forces="gradient"
    )
    fitted = Normalizers(Normalizer(1.0, 2.0), Normalizer(0.0, 0.5))
    model, settings = EquiformerV2(config), (TaskSettings(), OptimSettings())
    with pytest.raises(InputError, match=r"their std must be that of the energy, 2, not 0\.5"):
        S2EFTask(model, fitted, "total", *settings)
    S2EFTask(model, fitted.for_gradient(), "total", *settings)
    physical = fitted.for_gradient().denormalize({"stress": torch.ones(1, 3, 3)}, None)["stress"]
    assert torch.equal(physical, torch.full((1, 3, 3), 2.0))
    assert torch.equal(fitted.normalize_stress(physical), torch.ones(1, 3, 3))

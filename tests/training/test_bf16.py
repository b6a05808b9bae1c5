"""`trainer.precision: bf16-mixed`: what stays in float32, and that training is float32's but for rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from datasets_oc20 import OC20Lmdb
from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.errors import InputError
from equiformer2.graph import radius_graph
from equiformer2.kernels import attend, segment_softmax
from equiformer2.kernels.cpu import library
from equiformer2.model.attention import SO2EquivariantGraphAttention
from equiformer2.model.edge_context import EdgeGraph
from equiformer2.model.radial import RadialWeights
from equiformer2.training.configuration import parse
from equiformer2.training.folder import read_rows
from equiformer2.training.losses import energy_l1, force_l2
from equiformer2.training.optim import OptimSettings
from equiformer2.training.run import train
from equiformer2.training.task import S2EFTask, TaskSettings
from tests.observed import observed

Places = dict[str, set[torch.dtype]]

HAS_CPP = library.Compiler.find() is not None
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="no compiler"))]
CONFIG = ModelConfig(
    num_layers=2,
    lmax=2,
    mmax=2,
    sphere_channels=16,
    attn_hidden_channels=8,
    num_heads=2,
    attn_alpha_channels=8,
    attn_value_channels=4,
    ffn_hidden_channels=16,
    edge_channels=16,
    grid_resolution=8,
    num_distance_basis=16,
    max_radius=5.0,
    alpha_drop=0.0,
    drop_path_rate=0.0,
)


@pytest.fixture
def batch(lmdb_path: Path) -> Batch:
    data = OC20Lmdb(lmdb_path, "adsorption")
    return Batch.from_data_list([data[0], data[7]])


def make_task(backend: str = "torch") -> S2EFTask:
    torch.manual_seed(0)
    normalizers = Normalizers(energy=Normalizer(2.5, 0.5), forces=Normalizer(0.0, 0.2))
    settings = TaskSettings(backend=backend)  # type: ignore[arg-type]
    task = S2EFTask(EquiformerV2(CONFIG), normalizers, "adsorption", settings, OptimSettings())
    task._log_training = lambda *_: None  # type: ignore[method-assign]
    task.trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    return task


def step(task: S2EFTask, batch: Batch, bf16: bool) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients in one vector."""
    task.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = task.training_step(batch, 0)
    loss.backward()
    gradients = [p.grad.flatten() for p in task.model.parameters() if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    return loss.detach(), torch.cat(gradients)


def test_edges_are_those_of_float32(batch: Batch) -> None:
    """Over the whole way from positions to the blocks: vectors, frames, distance basis."""
    seen: list[list[Tensor]] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        edges: EdgeGraph = arguments[1]
        seen.append([edges.rotations, edges.distances, edges.basis()])

    task = make_task()
    for bf16 in (False, True):
        hook = task.model.blocks[0].register_forward_pre_hook(keep)
        step(task, batch, bf16)
        hook.remove()
    for exact, found in zip(*seen, strict=True):
        assert torch.equal(exact, found)
    arguments = batch.pos, batch.cell, batch.pbc, batch.natoms
    limits: dict[str, Any] = {"max_radius": 5.0, "max_neighbors": 20, "strict": True}
    exact = radius_graph(*arguments, **limits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(radius_graph(*arguments, **limits).vectors, exact.vectors)


def watched(
    places: dict[str, set[torch.dtype]], name: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    """`function`, noting the dtypes of its tensors, in and out, under `name` + ` in` and ` out`."""

    def called(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        note_dtypes(places, name, arguments, result)
        return result

    return called


def note_dtypes(places: Places, name: str, arguments: tuple[Any, ...], result: Any) -> None:
    """Add the dtypes of the tensors of a call to `places`, under `name` + ` in` and ` out`."""
    results = result if isinstance(result, tuple) else (result,)
    for where, values in ((" in", arguments), (" out", results)):
        dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
        places.setdefault(name + where, set()).update(dtypes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stays_in_float32(batch: Batch, backend: str) -> None:
    places: Places = {}
    task = make_task(backend)
    model = task.model
    assert isinstance(model, EquiformerV2)
    named = {
        "network norm": model.norm,
        "block norm": model.blocks[1].norm_2,
        "distance basis": model.distance_basis,
        "block": model.blocks[1],
        "head": model.energy_block.so3_linear_2,
        "bf16: feed-forward": model.blocks[1].ffn,
    }
    for name, module in named.items():
        module.forward = watched(places, name, module.forward)  # type: ignore[method-assign,union-attr]
    head: SO2EquivariantGraphAttention = model.force_block  # type: ignore[assignment]
    for name, linear in (("energy head", model.energy_block.so3_linear_2), ("force head", head.proj)):
        linear.degree = watched(places, name, linear.degree)  # type: ignore[method-assign]
    normalize = Normalizers.normalize_energy, Normalizers.normalize_forces
    functions = energy_l1, force_l2, *normalize, segment_softmax, attend, RadialWeights.hidden
    with observed(*functions, nn.functional.layer_norm) as calls:
        loss, _ = step(task, batch, bf16=True)
    for call in calls:
        name = call.name
        if name == "layer_norm" and tuple(call.arguments["normalized_shape"]) == (
            CONFIG.attn_alpha_channels,
        ):
            name = "attention norm"
        note_dtypes(places, name, tuple(call.arguments.values()), call.result)
    assert loss.dtype == torch.float32
    float32 = (
        *("energy_l1 out", "force_l2 in", "force_l2 out"),
        *("normalize_forces out", "segment_softmax in", "segment_softmax out", "attend out"),
        *("network norm in", "network norm out", "block norm in", "block norm out", "attention norm in"),
        *("distance basis in", "distance basis out", "block in", "block out"),
        *("energy head in", "energy head out", "force head in", "force head out"),
    )
    for place in float32:
        assert places[place] == {torch.float32}, place
    assert places["normalize_energy out"] == {torch.float64}  # energy_l1 rounds it
    assert places["energy_l1 in"] == {torch.float32, torch.float64}
    for place in ("bf16: feed-forward out", "hidden out"):
        assert places[place] == {torch.bfloat16}, place


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients_are_near_those_of_float32(batch: Batch, backend: str) -> None:
    task = make_task(backend)
    loss, gradient = step(task, batch, bf16=False)
    rounded_loss, rounded = step(task, batch, bf16=True)
    assert not torch.equal(rounded, gradient)
    torch.testing.assert_close(rounded_loss, loss, rtol=5e-4, atol=0)
    assert (rounded - gradient).norm() <= 0.02 * gradient.norm()


@pytest.mark.slow
def test_a_run_decreases_the_loss_as_float32_does(tmp_path: Path, tiny_arguments: list[str]) -> None:
    short = ["--trainer.max_epochs=4", "--trainer.limit_val_batches=1", "--optim.lr=5e-3"]
    runs = {}
    for precision in ("32-true", "bf16-mixed"):
        own = [f"--runs_dir={tmp_path}", f"--name={precision}", f"--trainer.precision={precision}"]
        folder = train(parse([*tiny_arguments, *short, *own]))
        rows = read_rows(folder / "metrics.csv")
        losses = torch.tensor([float(row["train/loss"]) for row in rows if row["train/loss"]])
        validation = [float(row["val/forces_mae"]) for row in rows if row["val/forces_mae"]]
        runs[precision] = losses, validation
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        tensors = [*state["state_dict"].values()]
        for parameter in state["optimizer_states"][0]["state"].values():
            tensors += parameter.values()
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    exact, rounded = runs["32-true"], runs["bf16-mixed"]
    assert exact[0][-4:].mean() < 0.8 * exact[0][:4].mean()
    assert not torch.equal(exact[0], rounded[0])
    torch.testing.assert_close(rounded[0], exact[0], rtol=0.01, atol=0)
    assert rounded[1] == pytest.approx(exact[1], rel=0.01)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
def test_other_precisions_are_refused(precision: str, tmp_path: Path, tiny_arguments: list[str]) -> None:
    own = [f"--runs_dir={tmp_path}", "--name=run", f"--trainer.precision={precision}"]
    with pytest.raises(
        InputError, match=rf"trainer\.precision is '{precision}'; it is '32-true', 'bf16-mixed'"
    ):
        train(parse([*tiny_arguments, *own]))

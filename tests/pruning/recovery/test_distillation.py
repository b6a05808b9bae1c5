"""Distillation, and pruning during training."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from killing import train_until_killed
from search_helpers import NORMALIZERS, save_tiny, slab, tiny_model, write_lmdb
from torch_geometric.data import Batch

from datasets_oc20 import OC20Lmdb
from equiformer2.checkpoint import load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.pruning.cost.targets import MacTarget
from equiformer2.pruning.recovery.callbacks import PLAN_FILE, DenseTeacher, GradualPruning
from equiformer2.pruning.recovery.distillation import distill, label
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_request import apply_plan
from equiformer2.training.configuration import parse
from equiformer2.training.optim import OptimSettings
from equiformer2.training.run import RunConfig, train
from equiformer2.training.task import S2EFTask, TaskSettings

CONFIGS = Path(__file__).parents[3] / "configs" / "pruning"
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
    "--data.batch_size=2",
    "--optim.lr=1e-3",
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    teacher = save_tiny(tmp_path / "teacher.pt")
    plan = PruningPlan.keep_all(tiny_model().config).with_block(0, heads=(1,), mmax=1)
    plan = plan.with_block(1, feed_forward=False)
    student = tmp_path / "student.pt"
    apply_plan(teacher, plan, student)
    return {
        "teacher": teacher,
        "student": student,
        "train": write_lmdb(tmp_path / "unlabelled.lmdb", [slab("a"), slab("b", "Pt")] * 2, labels=False),
        "val": write_lmdb(tmp_path / "val_unlabelled.lmdb", [slab("c", "Ni")], labels=False),
    }


def test_labels_are_the_teachers_answers_and_are_made_once(files, tmp_path) -> None:
    teacher = Predictor(files["teacher"])
    path = label(teacher, files["train"], tmp_path / "labelled.lmdb", batch_size=3)
    labelled = OC20Lmdb(path)
    assert labelled.energy_kind == "adsorption"
    expected = teacher.predict(Batch.from_data_list([labelled[1]]))
    torch.testing.assert_close(labelled[1].energy.double(), expected["energy"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(labelled[1].forces, expected["forces"], rtol=1e-4, atol=1e-5)
    written = path.stat().st_mtime_ns
    label(teacher, files["train"], path)
    assert path.stat().st_mtime_ns == written
    with pytest.raises(InputError, match="another teacher"):
        label(Predictor(files["student"]), files["train"], path)
    # Other structures under the same name are no others to the eye.
    write_lmdb(files["train"], [slab("a"), slab("b", "Ni")] * 2, labels=False)
    with pytest.raises(InputError, match="to other structures"):
        label(teacher, files["train"], path)


@pytest.mark.slow
def test_a_pruned_network_learns_from_the_dense_one_without_labels(files, tmp_path) -> None:
    out = tmp_path / "out"
    run = distill(files["student"], files["teacher"], files["train"], files["val"], out, QUICK)
    result = load_checkpoint(run / "checkpoints" / "last.pt")
    start = load_checkpoint(files["student"])
    assert result.config == start.config
    assert result.normalizers.to_dict() == start.normalizers.to_dict()
    changed = [
        n for n, w in result.model.state_dict().items() if not torch.equal(w, start.model.state_dict()[n])
    ]
    assert changed
    # Ended runs are continued by a longer one, from the same pruned network.
    longer = [*QUICK, "--trainer.max_epochs=3"]
    again = distill(files["student"], files["teacher"], files["train"], files["val"], out, longer)
    steps = load_checkpoint(again / "checkpoints" / "last.pt").provenance["step"]
    assert steps == 3 * result.provenance["step"] // 2


@pytest.mark.slow
def test_the_baseline_starts_from_random_weights(files, tmp_path) -> None:
    data = (files["train"], files["val"])
    run = distill(
        files["student"], files["teacher"], *data, tmp_path / "out",
        [*QUICK, "--optim.lr=1e-12"], from_scratch=True,
    )  # fmt: skip
    scratch = load_checkpoint(run / "checkpoints" / "last.pt").model.blocks[0].ga.proj.weight
    assert not torch.allclose(
        scratch, load_checkpoint(files["student"]).model.blocks[0].ga.proj.weight, atol=1e-3
    )


@pytest.mark.slow
def test_a_folder_belongs_to_one_distillation(files, tmp_path) -> None:
    data, out = (files["train"], files["val"]), tmp_path / "out"
    distill(files["student"], files["teacher"], *data, out, [*QUICK, "--trainer.max_epochs=1"])
    with pytest.raises(
        InputError, match=r"out holds a distillation with another from_scratch \(False, now True"
    ):
        distill(files["student"], files["teacher"], *data, out, QUICK, from_scratch=True)
    with pytest.raises(InputError, match="out holds a distillation with another student"):
        distill(files["teacher"], files["teacher"], *data, out, QUICK)
    (out / "distill.json").write_text('{"student": ')
    with pytest.raises(InputError, match=r"distill\.json is broken"):
        distill(files["student"], files["teacher"], *data, out, QUICK)


_DISTILL = """
import sys
from pathlib import Path
from equiformer2.pruning.recovery.distillation import distill
student, teacher, train, val, out, *arguments = sys.argv[1:]
distill(student, teacher, train, val, Path(out), arguments)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "every",
    [pytest.param(100, marks=pytest.mark.slow), 10],
    ids=["before-the-first-checkpoint", "after-some"],
)
def test_a_killed_distillation_ends_as_one_that_was_not(files, tmp_path, every: int) -> None:
    many = write_lmdb(tmp_path / "many.lmdb", [slab("a"), slab("b", "Pt")] * 60, labels=False)
    arguments = [*QUICK, "--trainer.max_epochs=1", f"--checkpoint_every_n_steps={every}"]
    same = (files["student"], files["teacher"], many, files["val"])
    whole = distill(*same, tmp_path / "whole", arguments)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", _DISTILL, *map(str, (*same, out)), *arguments]
    metrics = out / "run" / "metrics.csv"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 20:
            assert running.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        running.kill()
    assert (out / "run" / "checkpoints" / "last.ckpt").exists() == (every == 10)
    assert not (out / "run" / "checkpoints" / "last.pt").exists()
    again = distill(*same, out, arguments)
    ends = [load_checkpoint(run / "checkpoints" / "last.pt").model.state_dict() for run in (whole, again)]
    assert all(torch.equal(ends[1][name], weights) for name, weights in ends[0].items())


def test_teacher_and_student_predict_the_same_kind(files, tmp_path) -> None:
    other = tmp_path / "total.pt"
    model = tiny_model()
    save_checkpoint(
        other, model=model, raw_state=model.state_dict(), averaged_state=None, normalizers=NORMALIZERS,
        energy_kind="total", provenance={},
    )  # fmt: skip
    with pytest.raises(InputError, match="of its own kind"):
        distill(files["student"], other, files["train"], files["val"], tmp_path / "out", QUICK)


def test_a_teacher_replaces_the_labels_of_batches(files) -> None:
    task = S2EFTask(tiny_model(seed=3), NORMALIZERS, "adsorption", TaskSettings(), OptimSettings())
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, barebones=False)
    callback = DenseTeacher(str(files["teacher"]), validation="labels")
    callback.on_fit_start(trainer, task)
    batch = Batch.from_data_list([slab("a"), slab("b", "Pt")])
    batch.energy, batch.forces = torch.zeros(2), torch.zeros_like(batch.pos)
    callback.on_validation_batch_start(trainer, task, batch, 0)
    assert not batch.energy.any()
    callback.on_train_batch_start(trainer, task, batch, 0)
    expected = Predictor(files["teacher"]).predict(batch)
    torch.testing.assert_close(batch.energy.double(), expected["energy"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.forces, expected["forces"])
    task.energy_kind = "total"
    with pytest.raises(InputError, match="teacher of the same kind"):
        callback.on_fit_start(trainer, task)


def gradual_config(files, tmp_path, name: str, *extra: str) -> RunConfig:
    data = write_lmdb(tmp_path / "train.lmdb", [slab("a"), slab("b", "Pt")] * 4)
    val = write_lmdb(tmp_path / "val.lmdb", [slab("c", "Ni")])
    tiny = [f"--model.{key}={value}" for key, value in tiny_model().config.to_dict().items()]
    return parse(
        [
            "--config", str(CONFIGS / "gradual.yaml"), *tiny, *QUICK,
            f"--init_from={files['teacher']}", f"--data.train={data}", f"--data.val={val}",
            "--data.forces_only=null", "--data.energy_kind=adsorption", "--trainer.val_check_interval=null",
            f"--runs_dir={tmp_path}", f"--name={name}",
            f"--trainer.callbacks.data={data}", "--trainer.callbacks.every_n_steps=2",
            "--trainer.callbacks.first_step=1", "--trainer.callbacks.cuts=2", "--trainer.callbacks.tries=2",
            "--trainer.callbacks.structures=2", "--trainer.callbacks.keep=0.7", *extra,
        ]
    )  # fmt: skip


def gradual(files, tmp_path, name: str, *extra: str) -> Path:
    return train(gradual_config(files, tmp_path, name, *extra))


@pytest.mark.slow
def test_gradual_pruning_leaves_a_small_network(files, tmp_path) -> None:
    run = gradual(files, tmp_path, "gradual")
    plan = PruningPlan.load(run / PLAN_FILE)
    dense = tiny_model().config
    share = MacTarget(dense, 0.5, 8, 48).fraction_of(plan)
    assert 0.6 < share <= 0.71
    for name in ("last.pt", "best.pt"):
        assert load_checkpoint(run / "checkpoints" / name).config.blocks == plan.applied_to(dense).blocks
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    saved = next(value for key, value in state["callbacks"].items() if key.startswith("GradualPruning"))
    assert saved["done"] == 2
    assert PruningPlan.from_dict(saved["plan"]) == plan
    json.dumps(saved)


@pytest.mark.slow
def test_masked_weights_stay_zero_and_the_small_network_is_the_masked_one(files, tmp_path) -> None:
    """Momentum from before a cut must not move what was cut."""
    from equiformer2.pruning.structured.apply import shrink, weight_masks

    run = gradual(files, tmp_path, "gradual", "--trainer.callbacks.method=magnitude")
    plan = PruningPlan.load(run / PLAN_FILE)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = tiny_model()
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    parameters = dict(model.named_parameters())
    for name, mask in weight_masks(model, plan).items():
        assert not parameters[name][~mask].any(), name
    small = load_checkpoint(run / "checkpoints" / "last.pt", "raw").model
    for name, weight in shrink(model, plan).state_dict().items():
        torch.testing.assert_close(weight, small.state_dict()[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", pytest.param("search", marks=pytest.mark.slow)])
def test_a_stopped_gradual_pruning_ends_as_one_that_was_not(files, tmp_path, method) -> None:
    extra = (f"--trainer.callbacks.method={method}", "--checkpoint_every_n_steps=1")
    whole = gradual(files, tmp_path, "whole", *extra)
    # Between the two cuts.
    train_until_killed(gradual_config(files, tmp_path, "stopped", *extra), step=2)
    first = PruningPlan.load(tmp_path / "stopped" / PLAN_FILE)
    again = gradual(files, tmp_path, "stopped", *extra, "--ckpt_path=auto")
    plans = [PruningPlan.load(run / PLAN_FILE) for run in (whole, again)]
    assert plans[0] == plans[1] != first
    ends = [load_checkpoint(run / "checkpoints" / "last.pt").model.state_dict() for run in (whole, again)]
    assert all(torch.equal(ends[1][name], weights) for name, weights in ends[0].items())


def test_gradual_settings_are_checked() -> None:
    with pytest.raises(InputError, match="keep"):
        GradualPruning(keep=1.5, data="x")
    with pytest.raises(InputError, match="cuts"):
        GradualPruning(keep=0.5, data="x", cuts=0)

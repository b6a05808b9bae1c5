"""A run that trains two data sets together: its file, exact resuming, errors per task, refusals."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ase import Atoms
from launching import finish, start, start_two
from tiny_run import LMDB, TINY_RUN

from datasets_oc20 import DataError, LmdbWriter, OC20DataModule, OC20Lmdb
from equiformer2 import EquiformerV2Calculator, Predictor, load_checkpoint
from equiformer2.checkpoint.expert_files import ExpertContents, read_experts
from equiformer2.checkpoint.samples import MOST_ATOMS
from equiformer2.errors import InputError
from equiformer2.experts import ExpertNetwork, ExpertSettings
from equiformer2.experts.merge import merge_experts
from equiformer2.training.configuration import parse
from equiformer2.training.expert_part import ExpertPart
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.run import train

NOT_OURS = ("--data.", "--trainer.max_epochs", "--seed", "--model.num_layers", "--model.max_radius")
ARGUMENTS = [
    *(word for word in TINY_RUN if not word.startswith(NOT_OURS)),
    *("--seed=1", "--data.batch_size=4", "--trainer.max_epochs=-1", "--checkpoint_every_n_steps=1"),
    *("--model.num_layers=1", "--model.max_neighbors=6", "--model.max_radius=3.0"),
    "--optim.schedule=constant",
]
EXPERTS = ["--experts.num_experts=3", "--experts.channels=4", "--experts.hidden_channels=8"]

PRUNING = (
    "--trainer.callbacks=[{class_path: equiformer2.pruning.recovery.callbacks.GradualPruning, "
    "init_args: {keep: 0.5, data: x}}]"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Adsorption energies, and total energies of the same frames with a part per atom."""
    folder, frames = tmp_path_factory.mktemp("data"), OC20Lmdb(LMDB)
    rows = {"train": range(0, 6), "val": range(6, 8)}
    tasks: dict[str, dict[str, Any]] = {"dft": {}, "teacher": {}}
    for name, kind in (("dft", "adsorption"), ("teacher", "total")):
        for part, numbers in rows.items():
            path = folder / f"{name}_{part}.lmdb"
            with LmdbWriter(path, kind) as writer:
                for row in numbers:
                    frame = frames[row]
                    if kind == "total":
                        frame.energy = 3 * frame.energy - 40.0 * frame.atomic_numbers.sum()
                    writer.write(frame)
            tasks[name][part] = str(path)
    return tasks


def run(folder: Path, tasks: dict[str, Any], name: str, steps: int, *more: str) -> Path:
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({"data": {"tasks": tasks}}))
    words = [f"--config={config}", f"--runs_dir={folder}", f"--name={name}", f"--trainer.max_steps={steps}"]
    return train(parse([*words, *ARGUMENTS, *EXPERTS, *more])) / "checkpoints"


@pytest.fixture(scope="module")
def whole(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run of four steps, one and a third epochs."""
    return run(tmp_path_factory.mktemp("runs"), data, "whole", 4)


@pytest.fixture(scope="module")
def contents(whole: Path) -> ExpertContents:
    return read_experts(whole / "last_experts.safetensors")


def test_the_file_holds_units_and_data_of_every_task(whole: Path, contents: ExpertContents) -> None:
    assert not list(whole.glob("*.pt"))
    assert contents.available_weights == ("raw", "averaged")
    assert {name: task.energy_kind for name, task in contents.tasks.items()} == {
        "dft": "adsorption", "teacher": "total"
    }  # fmt: skip
    dft, teacher = (contents.tasks[name].normalizers for name in ("dft", "teacher"))
    assert dft.linear_references is None
    assert teacher.linear_references is not None
    assert dft.forces == teacher.forces
    assert dft.energy != teacher.energy
    for task in contents.tasks.values():
        assert task.composition.sum().item() == pytest.approx(1.0)
        assert set(task.provenance["training_data"]["elements"])
    assert contents.provenance["step"] == 4
    for weights in contents.weights.values():
        assert all(len(stack) == 3 for stack in weights.experts.values())
        assert all(len(stack) == 2 for stack in weights.heads.values())


def test_errors_of_every_task_are_logged(whole: Path, contents: ExpertContents) -> None:
    header = (whole.parent / "metrics.csv").read_text().partition("\n")[0].split(",")
    for name in ("val/forces_mae", "val/dft/forces_mae", "val/teacher/energy_mae", "train/energy_mae"):
        assert name in header
    values = contents.provenance["validation"]
    together = (values["dft/energy_mae"] + values["teacher/energy_mae"]) / 2
    assert values["energy_mae"] == pytest.approx(together, rel=1e-5)


def test_validation_errors_are_those_of_merged_checkpoints(
    whole: Path, contents: ExpertContents, data: dict[str, Any], tmp_path: Path
) -> None:
    """The whole way: units of a task, its head, its coefficients."""
    network = ExpertNetwork.from_contents(contents)
    file = whole / "last_experts.safetensors"
    for task in ("dft", "teacher"):
        errors = []
        for number, frame in enumerate(OC20Lmdb(data[task]["val"])):
            formula = Atoms(numbers=frame.atomic_numbers.tolist()).get_chemical_formula()
            out = tmp_path / f"{task}{number}.pt"
            summary = merge_experts(file, task, out, formula)
            assert sum(summary["coefficients"]) == pytest.approx(1.0, abs=1e-6)
            predicted = Predictor(out).predict([frame])
            errors.append(abs(float(predicted["energy"][0]) - float(frame.energy)))
            with torch.no_grad():
                found = network(frame, task)["forces"] * contents.tasks[task].normalizers.forces.std
            torch.testing.assert_close(predicted["forces"], found, rtol=0, atol=1e-5)
        validated = contents.provenance["validation"][f"{task}/energy_mae"]
        assert sum(errors) / len(errors) == pytest.approx(validated, rel=1e-4)


def test_a_stopped_run_goes_on_exactly(
    data: dict[str, Any], contents: ExpertContents, tmp_path: Path
) -> None:
    run(tmp_path, data, "stopped", 2)
    ended = run(tmp_path, data, "stopped", 4, "--ckpt_path=auto")
    found = read_experts(ended / "last_experts.safetensors")
    for kind, weights in contents.weights.items():
        for group, tensors in weights.groups().items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, found.weights[kind].groups()[group][name]), (group, name)
    with pytest.raises(InputError, match=r"model\.experts was"):
        run(tmp_path, data, "stopped", 5, "--ckpt_path=auto", "--experts.num_experts=4")
    with pytest.raises(InputError, match=r"trains another model|other normalizers"):
        run(tmp_path, {"other": data["dft"]}, "stopped", 5, "--ckpt_path=auto")


def test_experts_start_from_a_plain_network(data: dict[str, Any], tmp_path: Path) -> None:
    words = [f"--runs_dir={tmp_path}", "--trainer.max_steps=1", "--name=plain"]
    own = [f"--data.{part}={data['dft'][part]}" for part in ("train", "val")]
    plain = train(parse([*ARGUMENTS, *words, *own])) / "checkpoints" / "last.pt"
    more = [f"--init_from={plain}", "--experts.spread=1e-6", "--optim.lr=1e-12", "--model.num_layers=2"]
    started = run(tmp_path, data, "experts", 1, *more) / "last_experts.safetensors"
    out = tmp_path / "dft.pt"
    merge_experts(started, "dft", out)
    frames = [OC20Lmdb(data["dft"]["val"])[0]]
    before, after = Predictor(plain).predict(frames), Predictor(out).predict(frames)
    torch.testing.assert_close(after["forces"], before["forces"], rtol=1e-3, atol=1e-4)
    # Mean energies differ between the data sets alone.
    shift = load_checkpoint(out).normalizers.energy.mean - load_checkpoint(plain).normalizers.energy.mean
    torch.testing.assert_close(after["energy"], before["energy"] + shift, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="network of experts for several tasks"):
        run(tmp_path, data, "again", 1, f"--init_from={started}")


@pytest.mark.parametrize("forces", ["gradient", "none"])
@pytest.mark.one_in(2)
def test_networks_without_a_force_head_have_experts(
    data: dict[str, Any], tmp_path: Path, forces: str
) -> None:
    file = run(tmp_path, data, forces, 1, f"--model.forces={forces}") / "best_experts.safetensors"
    merge_experts(file, "teacher", tmp_path / "merged.pt")
    frame = OC20Lmdb(data["teacher"]["val"])[0]
    predicted = Predictor(tmp_path / "merged.pt").predict([frame])
    assert ("forces" in predicted) == (forces == "gradient")
    units = read_experts(file).tasks
    if forces == "gradient":
        assert units["dft"].normalizers.energy.std == units["teacher"].normalizers.energy.std
    assert units["dft"].normalizers.energy.mean != units["teacher"].normalizers.energy.mean


def test_an_expert_file_is_no_ordinary_checkpoint(whole: Path) -> None:
    file = whole / "last_experts.safetensors"
    for use in (load_checkpoint, Predictor, EquiformerV2Calculator):
        with pytest.raises(InputError, match="experts merge --checkpoint"):
            use(file)


def test_a_repeated_task_is_used_more_often(
    data: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = {"dft": {**data["dft"], "repeat": 3}, "teacher": {"train": data["teacher"]["train"]}}
    module = OC20DataModule(tasks=tasks, batch_size=5)
    with caplog.at_level(logging.INFO):
        module.setup()
    held = len(module.parts["teacher"].training)  # the others validate
    assert len(module.training) == 3 * 6 + held
    tasks_seen = torch.cat([batch.task for batch in module.train_dataloader()])
    assert tasks_seen.bincount().tolist() == [18, held]
    assert len(module.datasets["val"]) == 2 + 6 - held
    assert module.training.describe(7).endswith("key 1")
    assert len(module.training.natoms) == len(module.training)


def test_of_very_large_structures_as_many_are_kept_as_a_file_holds(tmp_path: Path) -> None:
    path, count = tmp_path / "large.lmdb", MOST_ATOMS // 2 + 1
    frame = OC20Lmdb(LMDB)[0]
    for name in ("pos", "forces", "atomic_numbers", "fixed", "tags"):
        copies = -(-count // int(frame.natoms))
        frame[name] = torch.cat([frame[name]] * copies)[:count]
    frame.pos += 3.0 * torch.arange(count)[:, None]
    frame.natoms = torch.tensor([count])
    with LmdbWriter(path, "adsorption") as writer:
        for fid in range(3):
            frame.fid = fid
            writer.write(frame)
    module = ResumableDataModule(tasks={"large": {"train": str(path), "val": str(path)}}, batch_size=1)
    module.setup()
    samples = ExpertPart(ExpertSettings(2), module, "direct", None).samples["large"]
    assert samples.natoms.tolist() == [count]


@pytest.mark.parametrize(
    ("tasks", "more", "sentence"),
    [
        (None, [], "experts.num_experts needs data.tasks"),
        ({"dft": {}}, ["--experts.num_experts=0"], "data.tasks is for a network of experts"),
        ({"dft": {}}, ["--experts.num_experts=1"], "num_experts is 1"),
        ({"dft": {"energy_kind": "total"}}, [], "declares adsorption energies, but total"),
        ({"dft": {"repeat": 0}}, [], "repeat must be a whole number"),
        ({"dft": {"trian": "x"}}, [], "unknown key 'trian'"),
        ({"d/f": {}}, [], "no name of a task"),
        ({"dft": {}}, ["--data.val=x.lmdb"], "data.val has no meaning beside data.tasks"),
        ({"dft": {}}, ["--task.dens={}"], "task.dens does not go with experts"),
        ({"dft": {}}, ["--task.backend=compile"], "compile does not go with experts"),
        ({"dft": {}}, [PRUNING], "trainer.callbacks does not go with experts"),
        ({"dft": {"train": None}}, [], "train is not set"),
        ({}, [], "data.tasks is empty"),
    ],
)
def test_wrong_configurations_get_one_sentence(
    data: dict[str, Any], tmp_path: Path, tasks: Any, more: list[str], sentence: str
) -> None:
    if tasks is not None:
        tasks = {name: {**data["dft"], **values} for name, values in tasks.items()}
    else:
        more = [*more, f"--data.train={data['dft']['train']}"]
    with pytest.raises((InputError, DataError), match=sentence) as found:
        run(tmp_path, tasks, "wrong", 1, *more)
    assert "\n" not in str(found.value)


@pytest.mark.slow
def test_two_processes_equal_one(data: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "tasks.yaml"
    config.write_text(yaml.safe_dump({"data": {"tasks": data}}))
    words = [
        f"--config={config}",
        *ARGUMENTS,
        *EXPERTS,
        "--trainer.max_steps=2",
        "--trainer.precision=64-true",
    ]
    finish([start([*words, "--data.batch_size=6"], tmp_path, "one")])
    finish(start_two([*words, "--data.batch_size=3"], tmp_path, "two", "lightning"))
    one, two = (
        read_experts(tmp_path / n / "checkpoints" / "last_experts.safetensors") for n in ("one", "two")
    )
    for kind, weights in one.weights.items():
        for group, tensors in weights.groups().items():
            for name, tensor in tensors.items():
                found = two.weights[kind].groups()[group][name]
                torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-9, msg=f"{group}/{name}")
    for name, value in one.provenance["validation"].items():
        assert two.provenance["validation"][name] == pytest.approx(value, rel=1e-6), name

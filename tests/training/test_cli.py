"""The command line: every key, and mistakes told in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from equiformer2.errors import InputError
from equiformer2.training.configuration import parse

ROOT = Path(__file__).parents[2]
DATA = ["--data.train=a.lmdb", "--data.val=b.lmdb"]


def test_any_key_can_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "my_run.yaml"
    file.write_text(
        "seed: 3\n"
        "model: {num_layers: 6, grid_resolution: null}\n"
        "optim: {lr: 4e-4}\n"
        "data: {train: a.lmdb, val: [b.lmdb, c.lmdb], normalizers: "
        "{energy_mean: -0.7, energy_std: 2.9, forces_std: 2.9}}\n"
        "trainer: {max_epochs: 2, precision: bf16-mixed}\n"
    )
    config = parse(
        ["--config", str(file), "--model.num_layers", "4", "--trainer.max_epochs=7", "--task.ema_decay=0"]
    )
    assert (config.model.num_layers, config.model.grid_resolution) == (4, None)
    assert (config.trainer["max_epochs"], config.trainer["precision"]) == (7, "bf16-mixed")
    assert (config.run.name, config.run.seed, config.data["seed"]) == ("my_run", 3, 3)
    assert config.optim.lr == 4e-4
    assert config.task.ema_decay == 0
    assert config.data["val"] == ["b.lmdb", "c.lmdb"]
    assert config.data["normalizers"].energy_std == 2.9


def test_the_resolved_config_is_complete_and_stable(tmp_path: Path) -> None:
    normalizers = '--data.normalizers={"energy_mean": -0.7, "energy_std": 2.9, "forces_std": 2.9}'
    first = parse([*DATA, "--model.grid_resolution=null", "--optim.lr=3e-4", "--name=x", normalizers])
    file = tmp_path / "config.yaml"
    file.write_text(first.text)
    second = parse(["--config", str(file)])
    assert second.text == first.text
    assert (second.model, second.optim, second.run) == (first.model, first.optim, first.run)
    assert second.model.grid_resolution is None
    assert second.data == first.data


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.num_layer=4", "unknown key 'model.num_layer'; did you mean 'model.num_layers'?"),
        ("--num_layers=4", "unknown key 'num_layers'; did you mean 'model.num_layers'?"),
        ("--trainer.max_epoch=4", "did you mean 'trainer.max_epochs'?"),
        ("--optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("--model.lmax=x", "model.lmax"),
        ("--model.mmax=9", "model.mmax"),
        ("--optim.lr=0", "optim.lr must be above 0"),
        ("--optim.lr=null", "optim.lr"),
        ("--task.energy_coefficient=null", "task.energy_coefficient"),
        ("--model=5", "model"),
        ("--task.ema_decay=1", "task.ema_decay"),
        ("--task.energy_coefficient=0 --task.force_coefficient=0", "so that nothing would be learned"),
        ("--trainer.gradient_clip_val=1", "decided by this program"),
        ("--config=missing.yaml", "no config file missing.yaml"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be at least 1, not 0"),
        ("--trainer.log_every_n_steps=0", "trainer.log_every_n_steps must be at least 1, not 0"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval is 0"),
        ("--seed=-1", "seed must be at least 0"),
        ("--optim.betas=[0.9,1.5]", "optim.betas must be at least 0 and below 1, not [0.9, 1.5]"),
        ("--name=../x", "name is '../x'; it must be a folder inside runs_dir"),
        ("--name=/tmp/x", "inside runs_dir"),
        ("--name=.", "inside runs_dir"),
    ],
)
def test_mistakes_are_one_sentence_about_the_key(argument: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse([*DATA, *argument.split()])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "--task.dens.probability=2",
            "configuration: task.dens.probability is 2.0; it must be above 0 and at most 1 (leave task.dens "
            "out to train without denoising)",
        ),
        ("--data.max_atoms=x", "configuration: data.max_atoms: Expected a <class 'int'>; got x"),
        (
            "--data.normalizers.energy_mean=1",
            "configuration: data.normalizers: the following arguments are required: energy_std, forces_std",
        ),
    ],
)
def test_keys_that_may_be_null_say_what_else_they_may_be(argument: str, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        parse([*DATA, argument])
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {lmaxx: 4}", "unknown key 'model.lmaxx'; did you mean 'model.lmax'?"),
        ("modl: {lmax: 4}", "unknown key 'modl.lmax'; did you mean 'model.lmax'?"),
        ("model: [", "not readable as YAML"),
        ("- 1", "must be a mapping"),
        ("model: 5", "model is 5; it must hold keys and values"),
        ("task: {energy_coefficient: null}", "task.energy_coefficient is null; it needs a value"),
        ("model: {grid_resolution: null, norm_type: null}", "model.norm_type"),
        (
            "data: {normalizers: {energy_men: 1}}",
            "unknown key 'data.normalizers.energy_men'; did you mean 'data.normalizers.energy_mean'?",
        ),
        ("data: {test: c.lmdb}", "unknown key 'data.test'"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        parse([*DATA, "--config", str(file)])
    assert message in str(error.value)


def test_missing_data_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.train"):
        parse(["--data.val=b.lmdb"])


@pytest.mark.slow
def test_the_script_says_one_line_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--model.num_layer=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: command line: unknown key 'model.num_layer'; did you mean 'model.num_layers'?\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_project_parses(config: Path) -> None:
    # The demo's data are made, and named, by scripts/demo.py.
    data = DATA if config.stem == "demo" else []
    assert parse([*data, "--config", str(config)]).run.name == config.stem


def test_training_data_alone_take_the_configuration_for_own_data() -> None:
    config = parse(["--data.train=my.lmdb", "--optim.lr=1e-4"])
    assert config.run.name == "own_data"
    assert config.data["val"] is None
    assert (config.optim.lr, config.trainer["max_steps"]) == (1e-4, 2000)
    assert parse(DATA).run.name is None

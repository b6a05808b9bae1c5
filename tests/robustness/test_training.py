"""Hostile and mistaken input to training: configurations, data, checkpoints, signals, threads."""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb
from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.training.cli import parse
from equiformer2.training.evaluation import evaluate, open_dataset, table
from equiformer2.training.folder import WandbSettings
from equiformer2.training.learning_curve import errors_by_system
from equiformer2.training.optim import OptimSettings
from equiformer2.training.resume_state import read_resume_state
from equiformer2.training.run import train
from equiformer2.training.task import S2EFTask

ROOT = Path(__file__).parents[2]
LMDB = ROOT / "tests" / "fixtures" / "datasets_oc20" / "s2ef_val_20.lmdb"
MODEL = {
    "num_layers": 1, "sphere_channels": 8, "attn_hidden_channels": 8, "num_heads": 1, "attn_alpha_channels": 4,
    "attn_value_channels": 4, "ffn_hidden_channels": 8, "lmax": 1, "mmax": 1, "grid_resolution": 6,
    "edge_channels": 8, "num_distance_basis": 8, "max_radius": 3.5, "max_neighbors": 6,
}  # fmt: skip
FILES = ["--data.train=a.lmdb", "--data.val=b.lmdb"]
SMALL = [
    f"--data.train={LMDB}", f"--data.val={LMDB}", "--data.energy_kind=adsorption", "--data.batch_size=5",
    *(f"--model.{key}={value}" for key, value in MODEL.items()), "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--model.alpha_drop=0",
]  # fmt: skip


# ---- configurations

YAML_BOMB = "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))

FILE_CASES = [
    ("duplicate group", "model: {lmax: 2}\nseed: 1\nmodel: {mmax: 1}\n", ["'model'", "duplicate"]),
    ("duplicate key", "optim:\n  lr: 1e-3\n  lr: 2e-3\n", ["'lr'", "duplicate"]),
    ("nested too deep", "model: " + "[" * 2000, ["nested", "deep"]),
    ("alias bomb", YAML_BOMB, ["aliases"]),
    ("object tag", "name: !!python/object/apply:os.system [ls]\n", ["not readable as YAML"]),
    ("infinite rate", "optim: {lr: .inf}", ["optim.lr", "finite"]),
    ("infinite decay", "optim: {weight_decay: .inf}", ["optim.weight_decay", "finite"]),
    ("NaN in a list", "optim: {betas: [.nan, 0.9]}", ["optim.betas", "finite"]),
    ("NaN limit", "trainer: {limit_val_batches: .nan}", ["trainer.limit_val_batches", "finite"]),
    ("infinite interval", "trainer: {val_check_interval: .inf}", ["trainer.val_check_interval", "finite"]),
    ("infinite noise", "task: {dens: {noise_std: .inf}}", ["task.dens.noise_std", "finite"]),
    ("infinite radius", "model: {max_radius: .inf}", ["model.max_radius", "finite"]),
    (
        "infinite mean",
        "data: {normalizers: {energy_mean: -.inf, energy_std: 1, forces_std: 1}}",
        ["data.normalizers.energy_mean", "finite"],
    ),
    ("no epochs", "trainer: {max_epochs: 0}", ["trainer.max_epochs", "nothing would be trained"]),
    ("no steps", "trainer: {max_steps: 0}", ["trainer.max_steps", "nothing would be trained"]),
    ("no time", "trainer: {max_time: '00:00:00:00'}", ["trainer.max_time", "nothing would be trained"]),
    ("no minutes", "trainer: {max_time: {minutes: 0}}", ["trainer.max_time", "nothing would be trained"]),
    ("no batches", "trainer: {limit_train_batches: 0.0}", ["trainer.limit_train_batches", "nothing would be"]),
    ("negative epochs", "trainer: {max_epochs: -5}", ["trainer.max_epochs", "-5"]),
    ("empty name", "name: ''", ["name is ''"]),
    ("blank name", "name: '  '", ["name is '  '"]),
    ("name above", "name: a/../../b", ["inside runs_dir"]),
    ("name of two lines", 'name: "a\\nb"', ["line breaks"]),
    ("long name", f"name: {'x' * 300}", ["too long"]),
    ("empty runs_dir", "runs_dir: ''", ["runs_dir is empty"]),
    ("project with a slash", "wandb: {project: me/oc20}", ["wandb.project", "'me/oc20'", "wandb.entity"]),
    ("project with a hash", "wandb: {project: 'a#b'}", ["wandb.project", "#"]),
    ("long project", f"wandb: {{project: {'p' * 129}}}", ["wandb.project", "128"]),
    ("empty project", "wandb: {project: ''}", ["wandb.project"]),
    ("entity alone", "wandb: {entity: me}", ["wandb.entity", "wandb.project"]),
    ("offline alone", "wandb: {offline: true}", ["wandb.offline", "wandb.project"]),
    ("refit without a start", "refit_normalizers: true", ["refit_normalizers", "init_from"]),
    ("fairchem's rate", "optim: {lr_initial: 1e-3}", ["optim.lr_initial", "optim.lr here"]),
    ("fairchem's interval", "optim: {eval_every: 100}", ["eval_every", "trainer.val_check_interval"]),
    ("fairchem's batches", "optim: {batch_size: 4}", ["optim.batch_size", "data.batch_size"]),
    ("fairchem's epochs", "optim: {max_epochs: 4}", ["optim.max_epochs", "'trainer.max_epochs'"]),
    ("fairchem's workers", "optim: {num_workers: 4}", ["optim.num_workers", "'data.num_workers'"]),
    ("fairchem's optimizer", "optim: {optimizer: AdamW}", ["optimizer", "leave it out"]),
    ("fairchem's average", "optim: {ema_decay: 0.9}", ["ema_decay", "task.ema_decay"]),
    ("fairchem's accumulation", "optim: {grad_accumulation_steps: 2}", ["trainer.accumulate_grad_batches"]),
    ("fairchem's identifier", "identifier: x", ["identifier", "name here"]),
    ("a group that is text", "model: model.yaml", ["model is 'model.yaml'", "keys and values"]),
    ("plugins", "trainer: {plugins: x}", ["trainer.plugins", "decided by this program"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "mistaken.yaml"


@pytest.mark.parametrize(
    ("text", "told"), [case[1:] for case in FILE_CASES], ids=[case[0] for case in FILE_CASES]
)
def test_a_mistaken_file_is_one_sentence(text: str, told: list[str], config: Path) -> None:
    config.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        parse([*FILES, f"--config={config}"])
    assert all(part in str(error.value) for part in told), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--config=.", "is a folder"),
        ("--config=/dev/zero", "is a device"),
        ("--config=a\0b", "not a possible file name"),
        ("--trainer.callbacks=" + "[" * 5000, "nested"),
        ('--model={"lmax": 1, "lmax": 2}', "duplicate"),
        ("--model=model.yaml", "use --config"),
        ("--optim.lr=.inf", "optim.lr is inf"),
        ("--name=", "name is ''"),
    ],
)
def test_a_mistaken_argument_is_one_sentence(argument: str, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        parse([*FILES, argument])


def test_settings_check_themselves_without_a_file() -> None:
    with pytest.raises(InputError, match=r"optim\.clip_grad_norm is inf"):
        OptimSettings(clip_grad_norm=float("inf"))
    with pytest.raises(InputError, match=r"wandb\.project is 'a/b'"):
        WandbSettings(project="a/b")


IMPORTS = [
    ("a callback", "trainer: {callbacks: [{class_path: EVIL.Cb}]}", []),
    ("a callback by name alone", "trainer: {callbacks: EVIL.Cb}", []),
    ("names in a list", "trainer: {callbacks: [EVIL.Cb]}", []),
    ("a strategy", "trainer: {strategy: EVIL.Cb}", []),
    ("a profiler", "trainer: {profiler: EVIL.Cb}", []),
    ("an accelerator", "trainer: {accelerator: EVIL.Cb}", []),
    ("a plugin", "trainer: {plugins: [EVIL.Cb]}", []),
    ("normalizers", "data: {normalizers: EVIL.Cb}", []),
    ("a group", "wandb: EVIL.Cb", []),
    ("a time", "trainer: {max_time: {class_path: EVIL.Cb}}", []),
    (
        "inside an allowed one",
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: {class_path: EVIL.Cb}}}]}",
        [],
    ),
    (
        "a function for an allowed kind",
        "trainer: {callbacks: [{class_path: pytorch_lightning.callbacks.LambdaCallback, "
        "init_args: {on_fit_start: EVIL.Cb}}]}",
        [],
    ),
    ("the command line", "seed: 1", ["--trainer.callbacks=EVIL.Cb"]),
    ("appended", "seed: 1", ["--trainer.callbacks+=EVIL.Cb"]),
    ("its class path", "seed: 1", ["--trainer.callbacks.class_path", "EVIL.Cb"]),
    ("its help", "seed: 1", ["--trainer.callbacks.help", "EVIL.Cb"]),
    ("a group on the command line", "seed: 1", ["--model=EVIL.Cb"]),
]


@pytest.mark.parametrize(
    ("text", "more"), [case[1:] for case in IMPORTS], ids=[case[0] for case in IMPORTS]
)
def test_no_configuration_imports_a_module(
    text: str, more: list[str], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "imported"
    name = f"evil_{tmp_path.name}"
    source = f"open({str(trace)!r}, 'w')\nfrom pytorch_lightning import Callback\nclass Cb(Callback): pass\n"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    config.write_text(text.replace("EVIL", name), encoding="utf-8")
    if any(key in text for key in ("strategy", "profiler", "accelerator")):
        parse([*FILES, f"--config={config}"])  # refused by the trainer, as a text
    else:
        with pytest.raises(InputError, match=r"class_path|trainer\.callbacks|plugins|keys and values"):
            parse([*FILES, f"--config={config}", *(part.replace("EVIL", name) for part in more)])
    assert not trace.exists()
    assert name not in sys.modules


def test_allowed_callbacks_are_made() -> None:
    stopping = '{"class_path": "EarlyStopping", "init_args": {"monitor": "val/forces_mae"}}'
    found = parse([*FILES, f"--trainer.callbacks+={stopping}", "--trainer.callbacks.patience=7"])
    (made,) = found.trainer["callbacks"]
    assert (type(made).__name__, made.monitor, made.patience) == ("EarlyStopping", "val/forces_mae", 7)


IGNORED = [
    ("--task.ema_decay=0", "--task.ema_warmup=false", "task.ema_warmup has no effect: task.ema_decay is 0"),
    ("--optim.schedule=constant", "--optim.lr_min_factor=0.5", "optim.lr_min_factor has no effect"),
    ("--data.max_neighbors=10", "--seed=1", "data.max_neighbors has no effect"),
    ("--task.max_skipped_steps=3", "--seed=1", "task.max_skipped_steps has no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "told"), IGNORED)
def test_settings_without_effect_are_told(
    one: str, other: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError):  # there are no such data; the log comes before them
        train(parse([*FILES, one, other, f"--runs_dir={tmp_path}", "--name=told"]))
    assert told in (tmp_path / "told" / "log.txt").read_text()


@pytest.mark.parametrize("name", ["oc20_all_md_31M", "oc20_2m_83M", "oc20_small"])
def test_a_configuration_for_millions_begins_on_twenty(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the network is made smaller; intervals and limits stay."""
    config = ROOT / "configs" / f"{name}.yaml"
    own = ["--trainer.devices=1", "--trainer.num_nodes=1", "--data.num_workers=0", "--trainer.precision=32-true"]
    own += ["--trainer.max_epochs=1", "--init_from=null", "--data.normalizers=null", "--data.forces_only=null", f"--runs_dir={tmp_path}"]
    folder = train(parse(["--config", str(config), *SMALL, *own]))
    assert (folder / "checkpoints" / "best.pt").exists()

"""Hostile and mistaken input to training: configurations, data, checkpoints, signals, threads."""

import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from torch_geometric.data import Data

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb
from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.training.config_values import CALLBACKS
from equiformer2.training.configuration import parse
from equiformer2.training.evaluation import evaluate, open_dataset
from equiformer2.training.learning_curve import errors_by_system
from equiformer2.training.optim import OptimSettings
from equiformer2.training.resume_state import read_resume_state
from equiformer2.training.run import train
from equiformer2.training.wandb_logging import WandbSettings
from tests.hooks import fails, with_hooks

ROOT = Path(__file__).parents[2]
LMDB = ROOT / "tests" / "fixtures" / "datasets_oc20" / "s2ef_val_20.lmdb"
MODEL = {
    "num_layers": 1, "sphere_channels": 8, "attn_hidden_channels": 8, "num_heads": 1,
    "attn_alpha_channels": 4, "attn_value_channels": 4, "ffn_hidden_channels": 8, "lmax": 1, "mmax": 1,
    "grid_resolution": 6, "edge_channels": 8, "num_distance_basis": 8, "max_radius": 3.5, "max_neighbors": 6,
}  # fmt: skip
FILES = ["--data.train=a.lmdb", "--data.val=b.lmdb"]
SMALL = [
    f"--data.train={LMDB}", f"--data.val={LMDB}", "--data.energy_kind=adsorption", "--data.batch_size=5",
    *(f"--model.{key}={value}" for key, value in MODEL.items()), "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--model.alpha_drop=0",
    "--trainer.limit_val_batches=0",
]  # fmt: skip


# ---- configurations

YAML_BOMB = "a: &a [1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)

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
    ("no batches", "trainer: {limit_train_batches: 0.0}", ["limit_train_batches", "nothing would be"]),
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


@pytest.mark.one_in(3)
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
        ("--config=a\0b", "there is no configuration a\0b"),
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
    ("a block", "model: {blocks: [EVIL.Cb]}", []),
    ("blocks", "model: {blocks: EVIL.Cb}", []),
    ("a head", "model: {force_head: EVIL.Cb}", []),
    ("a head on the command line", "seed: 1", ["--model.energy_head=EVIL.Cb"]),
    ("blocks on the command line", "seed: 1", ["--model.blocks=[EVIL.Cb]"]),
    ("appended blocks", "seed: 1", ["--model.blocks+=EVIL.Cb"]),
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


@pytest.mark.parametrize(("text", "more"), [case[1:] for case in IMPORTS], ids=[case[0] for case in IMPORTS])
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


@pytest.mark.parametrize("name", CALLBACKS)
def test_allowed_callbacks_take_plain_values_only(name: str) -> None:
    """A function or an object would be named, and so imported, as a class is."""
    module, _, kind = name.rpartition(".")
    hints = get_type_hints(getattr(importlib.import_module(module), kind).__init__)
    plain = {str, int, float, bool, type(None), timedelta, Any}
    found, known = list(hints.values()), set()
    while found:
        hint = found.pop()
        if get_origin(hint) is Literal:
            continue
        found.extend(get_args(hint))
        if not get_args(hint):
            known.add(hint)
    assert known <= plain, known - plain


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
def test_settings_without_effect_are_told(one: str, other: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):  # there are no such data; the log comes before them
        train(parse([*FILES, one, other, f"--runs_dir={tmp_path}", "--name=told"]))
    assert told in (tmp_path / "told" / "log.txt").read_text()


@pytest.mark.parametrize(
    "name",
    ["oc20_2m_83M", *(pytest.param(n, marks=pytest.mark.slow) for n in ("oc20_all_md_31M", "oc20_small"))],
)
def test_a_configuration_for_millions_begins_on_twenty(name: str, tmp_path: Path) -> None:
    """Only the network is made smaller; intervals and limits stay."""
    config = ROOT / "configs" / f"{name}.yaml"
    own = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.limit_val_batches=1"]
    own += ["--data.num_workers=0", "--data.forces_only=null", "--data.normalizers=null"]
    own += ["--trainer.max_epochs=1", "--init_from=null", f"--runs_dir={tmp_path}"]
    folder = train(parse(["--config", str(config), *SMALL, *own]))
    assert (folder / "checkpoints" / "best.pt").exists()


# ---- signals and threads


@pytest.fixture(autouse=True)
def _answers_to_ctrl_c() -> Iterator[None]:
    """A process in the background of a shell is born with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGHUP, id="lost terminal", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_interrupted_saves_and_goes_on(sent: signal.Signals, tmp_path: Path) -> None:
    arguments = [*SMALL, f"--runs_dir={tmp_path}", "--name=stopped"]
    if sent is signal.SIGHUP:
        signal.signal(sent, signal.SIG_DFL)  # as without nohup
    interrupted = with_hooks(parse(arguments), on_train_batch_start=lambda *_: os.kill(os.getpid(), sent))
    with pytest.raises(SystemExit) as stopped:
        train(interrupted)
    assert stopped.value.code == 128 + sent
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert read_resume_state(last)["global_step"] == 1
    train(parse([*arguments, "--ckpt_path=last"]))
    assert read_resume_state(last)["global_step"] == 4


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    arguments = [*SMALL, f"--runs_dir={tmp_path}", "--name=now"]
    with pytest.raises(SystemExit) as stopped:
        train(with_hooks(parse(arguments), on_train_batch_start=twice))
    assert stopped.value.code == 130
    assert not (tmp_path / "now" / "checkpoints" / "last.ckpt").exists()
    train(parse(arguments))  # nothing was trained, so its name is free


def test_ctrl_c_in_the_last_validation_is_one(tmp_path: Path) -> None:
    """Lightning would exit with status 1 and ignore every later Ctrl-C."""
    limits = ["--trainer.max_steps=1", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=1"]
    config = parse([*SMALL, *limits, f"--runs_dir={tmp_path}", "--name=valid"])
    with pytest.raises(KeyboardInterrupt):
        train(with_hooks(config, on_validation_batch_start=fails(KeyboardInterrupt())))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "valid" / "checkpoints" / "last.ckpt").exists()


def test_training_in_a_thread(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    done: list[Any] = []

    def work() -> None:
        try:
            done.append(train(parse([*SMALL, f"--runs_dir={tmp_path}", "--name=thread"])))
        except BaseException as error:
            done.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [tmp_path / "thread"]
    assert "not in the main thread" in (tmp_path / "thread" / "log.txt").read_text()
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


def test_a_run_that_ended_before_its_first_checkpoint_says_how_it_begins_again(tmp_path: Path) -> None:
    folder = tmp_path / "early"
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,train/loss\n0,1.5\n")
    arguments = [*SMALL, f"--runs_dir={tmp_path}", "--name=early"]
    for more in ([], ["--ckpt_path=last"]):
        with pytest.raises(InputError, match="--ckpt_path auto"):
            train(parse([*arguments, *more]))


# ---- checkpoints to resume from


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = [f"--runs_dir={tmp_path_factory.mktemp('runs')}", "--name=run", "--trainer.max_steps=2"]
    return train(parse([*SMALL, *own, "--trainer.max_epochs=-1"]))


@pytest.mark.slow
def test_the_rest_of_an_epoch_is_trained_after_a_limit_on_steps(run: Path, tmp_path: Path) -> None:
    class Mine(Callback):
        """One that only Python can give."""

        steps = 0

        def on_train_batch_end(self, *_: object) -> None:
            self.steps += 1

    last, mine = run / "checkpoints" / "last.ckpt", Mine()
    config = parse([*SMALL, f"--runs_dir={tmp_path}", "--name=rest", f"--ckpt_path={last}"])
    folder = train(replace(config, trainer=config.trainer | {"callbacks": [mine]}))
    assert read_resume_state(folder / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert mine.steps == 2


def _no_moments(state: dict[str, Any]) -> None:
    for moments in state["optimizer_states"][0]["state"].values():
        moments["exp_avg"] = torch.zeros(2)


def as_meta(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


EDITS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("step as text", lambda state: state.update(global_step="two"), "global_step"),
    ("negative step", lambda state: state.update(global_step=-2), "global_step"),
    ("no epoch", lambda state: state.pop("epoch"), "epoch"),
    ("no loops", lambda state: state.pop("loops"), "loops"),
    ("loops of another program", lambda state: state.update(loops={"fit_loop": {}}), "loops"),
    (
        "progress as text",
        lambda state: state["loops"]["fit_loop"]["epoch_progress"]["current"].update(completed="x"),
        "epoch_progress.current.completed",
    ),
    ("no callbacks", lambda state: state.update(callbacks=None), "callbacks"),
    ("callback without state", lambda state: state["callbacks"]["ResumeCheckpoint"].clear(), "damaged"),
    ("row of texts", lambda s: s["callbacks"]["ResumeCheckpoint"].update(row={"lr": "x"}), "row"),
    ("generators", lambda s: s["callbacks"]["ResumeCheckpoint"].update(random={"torch": 1}), "damaged"),
    ("no optimizer", lambda state: state.pop("optimizer_states"), "optimizer_states"),
    ("optimizer of nothing", lambda state: state["optimizer_states"][0].pop("state"), "damaged"),
    ("other moments", _no_moments, "exp_avg"),
    ("schedule as text", lambda state: state["lr_schedulers"][0].update(last_epoch="x"), "last_epoch"),
    ("two schedules", lambda state: state["lr_schedulers"].append({}), "lr_schedulers"),
    ("no normalizers", lambda state: state["equiformer2"].pop("normalizers"), "equiformer2"),
    ("guard of text", lambda state: state["equiformer2"].update(guard="x"), "damaged"),
    ("no seed", lambda state: state["equiformer2"].pop("seed"), "seed"),
    ("weights as lists", lambda s: s.update(state_dict={n: [1.0] for n in s["state_dict"]}), "state_dict"),
    ("meta tensors", lambda s: s.update(state_dict=as_meta(s["state_dict"])), "hold their numbers"),
    ("no version", lambda state: state.pop("pytorch-lightning_version"), "version"),
    ("odd version", lambda state: state.update({"pytorch-lightning_version": "x.y"}), "damaged"),
]  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("edit", "told"), [case[1:] for case in EDITS], ids=[case[0] for case in EDITS])
def test_an_edited_checkpoint_is_one_sentence(
    edit: Callable[[dict[str, Any]], object], told: str, run: Path, tmp_path: Path
) -> None:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    edit(state)
    path = tmp_path / "edited.ckpt"
    torch.save(state, path)
    with pytest.raises(InputError) as error:
        train(parse([*SMALL, f"--runs_dir={tmp_path}", "--name=again", f"--ckpt_path={path}"]))
    assert str(path) in str(error.value)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


class Command:
    """Object that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", [("callbacks",), ("optimizer_states", 0), ("loops", "fit_loop"), ()])
def test_code_in_a_checkpoint_to_resume_from_is_not_run(place: tuple[Any, ...], tmp_path: Path) -> None:
    path, mark = tmp_path / "last.ckpt", tmp_path / "mark"
    state: dict[Any, Any] = {"global_step": 1, "equiformer2": {"normalizers": {}}, "callbacks": {}}
    state |= {"optimizer_states": [{}], "loops": {"fit_loop": {}}}
    inside = state
    for key in place:
        inside = inside[key]
    inside["more"] = Command(f"touch {mark}")
    torch.save(state, path)
    with pytest.raises(InputError, match=r"system, which could run code and is refused"):
        read_resume_state(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "is empty"), (b"x" * 5000, "damaged"), (b"PK\x03\x04" + b"\0" * 500, "damaged")],
    ids=["empty", "noise", "a torn archive"],
)
def test_a_damaged_checkpoint_names_the_one_before(
    content: bytes, told: str, run: Path, tmp_path: Path
) -> None:
    path, before = tmp_path / "last.ckpt", tmp_path / "step_1.ckpt"
    path.write_bytes(content)
    before.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(InputError, match=f"{told}.*give --ckpt_path {before}"):
        read_resume_state(path)
    assert read_resume_state(before)["global_step"] == 2


# ---- data and starting points


def frames(
    path: Path, change: Callable[[int, Data], object], kind: str = "adsorption", count: int = 20
) -> Path:
    """The fixture's frames, changed."""
    records = OC20Lmdb(LMDB)
    with LmdbWriter(path, kind) as writer:
        for index in range(count):
            record = records[index]
            change(index, record)
            writer.write(record)
    return path


LACKS = [
    ("forces of one", lambda i, data: i == 13 and data.__delitem__("forces"), ["key 13", "no forces"]),
    ("forces of the last", lambda i, data: i == 19 and data.__delitem__("forces"), ["key 19", "no forces"]),
    ("energy of one", lambda i, data: i == 7 and data.__delitem__("energy"), ["key 7", "no energy"]),
    ("forces of all", lambda _, data: data.__delitem__("forces"), ["no forces", "model.forces: none"]),
    ("forces of all but one", lambda i, data: i != 4 and data.__delitem__("forces"), ["key 4", "forces"]),
]  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize(("change", "told"), [case[1:] for case in LACKS], ids=[case[0] for case in LACKS])
def test_what_a_record_lacks_is_said_before_the_first_step(
    change: Callable[[int, Data], object], told: list[str], part: str, tmp_path: Path
) -> None:
    path = frames(tmp_path / "part.lmdb", change)
    with pytest.raises((InputError, DataError)) as error:
        train(parse([*SMALL, f"--data.{part}={path}", f"--runs_dir={tmp_path}", "--name=x"]))
    assert all(part in str(error.value) for part in ["part.lmdb", *told]), str(error.value)
    assert not (tmp_path / "x" / "config.yaml").exists()


def start(path: Path, mean: float = 0.7, std: float = 3.3, forces: float = 2.3, **provenance: Any) -> Path:
    """A checkpoint of an adsorption-energy model with the small network."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = EquiformerV2(ModelConfig(**MODEL))
    normalizers = Normalizers(Normalizer(mean, std), Normalizer(0.0, forces))
    state = {
        name: value + 0.1 if name.endswith("proj.weight") else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    save_checkpoint(
        path, model=model, raw_state=state, averaged_state=None, normalizers=normalizers,
        energy_kind="adsorption", provenance=provenance,
    )  # fmt: skip
    return path


def test_energies_alone_start_from_a_checkpoint_with_forces(tmp_path: Path) -> None:
    path = frames(tmp_path / "energies.lmdb", lambda _, data: data.__delitem__("forces"))
    arguments = [*SMALL, f"--data.train={path}", f"--data.val={path}", f"--runs_dir={tmp_path}", "--name=e"]
    arguments.append(f"--init_from={start(tmp_path / 'start.pt')}")
    with pytest.raises(InputError, match=r"set model\.forces: none"):
        train(parse(arguments))
    folder = train(parse([*arguments, "--model.forces=none"]))
    found = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert found.config.forces == "none"
    log = (folder / "log.txt").read_text()
    assert "starting from" in log
    assert "0.7000 ± 3.3000 eV" in log


def total(_: int, data: Data) -> None:
    data.energy = data.energy - 5.0 * data.atomic_numbers.sum()


def emt(_: int, data: Data) -> None:
    data.energy = data.energy * 0 + 0.23 * data.natoms + 0.01 * data.energy


@pytest.mark.parametrize(
    "change", [pytest.param(total, id="of DFT"), pytest.param(emt, id="of EMT", marks=pytest.mark.slow)]
)
def test_total_energies_start_from_adsorption_energies(
    change: Callable[[int, Data], object], tmp_path: Path
) -> None:
    path = frames(tmp_path / "total.lmdb", change, "total")
    arguments = [*SMALL, f"--data.train={path}", f"--data.val={path}", "--data.energy_kind=total"]
    arguments += [f"--runs_dir={tmp_path}", "--name=t", f"--init_from={start(tmp_path / 'start.pt')}"]
    with pytest.raises(InputError, match=r"adsorption energies .* total energies.*--refit_normalizers true"):
        train(parse(arguments))
    still = ["--optim.lr=1e-12", "--optim.weight_decay=0", "--refit_normalizers=true"]
    folder = train(parse([*arguments, *still]))
    before, after = Predictor(tmp_path / "start.pt"), Predictor(folder / "checkpoints" / "last.pt")
    assert after.energy_kind == "total"
    assert after.checkpoint.normalizers.linear_references is not None
    batch = OC20Lmdb(path)[0]
    forces = [predictor.predict(batch)["forces"] for predictor in (before, after)]
    assert forces[0].abs().max() > 1e-3
    torch.testing.assert_close(forces[1], forces[0], rtol=1e-4, atol=1e-6)
    evaluation = evaluate(after, open_dataset(path, after, None))
    assert evaluation.mean_energy_of == "training data"
    assert evaluation.baselines["mean_energy"] == pytest.approx(evaluation.baselines["data_mean_energy"])


@pytest.mark.slow
def test_normalizers_of_other_data_are_told_with_both_numbers(tmp_path: Path) -> None:
    arguments = [*SMALL, f"--runs_dir={tmp_path}", f"--init_from={start(tmp_path / 'start.pt')}"]
    log = (train(parse([*arguments, "--name=kept"])) / "log.txt").read_text()
    assert "normalizers in use: of init_from" in log
    assert "energy 0.7000 ± 3.3000 eV, forces ± 2.3000 eV/Å" in log
    (warning,) = [line for line in log.splitlines() if "are far from the training data" in line]
    for number in ("0.7000 ± 3.3000", "2.4877 ± 0.4473", "± 2.3000", "± 0.1670", "--refit_normalizers true"):
        assert number in warning
    log = (train(parse([*arguments, "--name=refit", "--refit_normalizers=true"])) / "log.txt").read_text()
    assert "normalizers in use: of the training data: energy 2.4877 ± 0.4473 eV" in log
    assert "are far from the training data" not in log


# ---- baselines


def test_the_baseline_is_the_mean_of_the_data_at_hand(tmp_path: Path) -> None:
    """The checkpoint's normalizer, of other data, would make any model look good."""
    energies = np.array([float(OC20Lmdb(LMDB)[index].energy) for index in range(20)])
    spread = np.abs(energies - energies.mean()).mean()
    unknown = Predictor(start(tmp_path / "unknown.pt"))
    known = Predictor(start(tmp_path / "known.pt", training_data={"energy_mean_eV": 2.0}))
    odd = Predictor(start(tmp_path / "odd.pt", training_data={"energy_mean_eV": float("nan")}))
    for predictor in (unknown, odd):
        found = evaluate(predictor, open_dataset(LMDB, predictor, "adsorption"))
        assert found.mean_energy_of == "these data"
        assert found.baselines["mean_energy"]["energy_mae"] == pytest.approx(spread, rel=1e-5)
        assert f"(mean energy of these data {spread:.4f}," in found.table()
    found = evaluate(known, open_dataset(LMDB, known, "adsorption"))
    assert found.baselines["mean_energy"]["energy_mae"] == pytest.approx(
        np.abs(energies - 2.0).mean(), rel=1e-5
    )
    assert (
        f"mean energy of the training data {np.abs(energies - 2.0).mean():.4f}, mean energy of these data"
        in found.table()
    )
    by_system = errors_by_system(unknown, open_dataset(LMDB, unknown, "adsorption"))
    assert next(iter(by_system.values())).mean_energy_mae == pytest.approx(spread, rel=1e-5)


@pytest.mark.parametrize(("systems", "shown"), [(20, False), (15, False), (10, True), (1, True)])
def test_systems_of_one_frame_have_no_mean_to_beat(systems: int, shown: bool, tmp_path: Path) -> None:
    path = frames(tmp_path / "own.lmdb", lambda index, data: setattr(data, "sid", f"s{index % systems}"))
    predictor = Predictor(start(tmp_path / "start.pt"))
    found = evaluate(predictor, open_dataset(path, predictor, None))
    assert ("per-system mean" in found.table()) == shown
    assert ("system_mean_energy" in found.baselines) == shown


def test_a_resumed_run_with_nothing_left_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("equiformer2").propagate = True
    own = [f"--runs_dir={run.parent}", "--name=run", "--trainer.max_steps=2", "--trainer.max_epochs=-1"]
    train(parse([*SMALL, *own, "--ckpt_path=last"]))
    assert "no step was trained" in (run / "log.txt").read_text()

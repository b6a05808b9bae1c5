"""Routers trained beside a network: the network does not notice, stopped runs go on, processes agree."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from killing import train_until_killed
from search_helpers import save_tiny, slab, tiny_model, write_lmdb
from torch_geometric.data import Batch

from datasets_oc20 import OC20Lmdb
from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.pruning.recovery.router_callback import ROUTER_FILE, TrainRouter
from equiformer2.pruning.routing import FTPRouter, RouterTraining, load_router, train_router
from equiformer2.pruning.routing.router_files import router_to_dict
from equiformer2.training.configuration import parse
from equiformer2.training.folder import read_rows
from equiformer2.training.run import train

ROOT = Path(__file__).parents[3]
LAYERS = {"num_layers": 3, "alpha_drop": 0.2, "drop_path_rate": 0.1}
TRAINED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    structures = [slab(sid, element) for sid, element in zip("abcd", ("Cu", "Pt", "Ni", "Ag"), strict=True)]
    return {
        "start": save_tiny(folder / "start.pt", **LAYERS),
        "train": write_lmdb(folder / "train.lmdb", structures),
        "val": write_lmdb(folder / "val.lmdb", [slab("e", "Pd")]),
        "config": write_config(folder / "router.yaml"),
    }


def write_config(path: Path) -> Path:
    callback = {
        "class_path": "equiformer2.pruning.recovery.router_callback.TrainRouter",
        "init_args": {"levels": 0.4, "temperature": 0.3},
    }
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return path


def arguments(files: dict[str, Path], runs: Path, name: str, *more: str, router: bool = True) -> list[str]:
    tiny = [f"--model.{key}={value}" for key, value in tiny_model(**LAYERS).config.to_dict().items()]
    return [
        *([f"--config={files['config']}"] if router else []), *tiny,
        "--seed=1", f"--init_from={files['start']}", f"--data.train={files['train']}",
        f"--data.val={files['val']}", "--data.energy_kind=adsorption", "--data.batch_size=2",
        "--optim.lr=1e-3", "--trainer.accelerator=cpu", "--trainer.max_epochs=3",
        "--trainer.log_every_n_steps=1", f"--runs_dir={runs}", f"--name={name}", *more,
    ]  # fmt: skip


def run(*options: Any, **more: Any) -> Path:
    return train(parse(arguments(*options, **more)))


def last(run: Path) -> dict[str, Any]:
    return dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True))


def callback_state(run: Path) -> dict[str, Any]:
    return next(value for key, value in last(run)["callbacks"].items() if key.startswith("TrainRouter"))


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Nested contents, bit by bit."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    else:
        assert left == right, where


@pytest.fixture(scope="module")
def whole(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(files, tmp_path_factory.mktemp("runs"), "whole")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["averaged", pytest.param("raw", marks=pytest.mark.slow)])
def test_the_network_does_not_notice(files, whole, tmp_path, weights) -> None:
    alone = run(files, tmp_path, "alone", router=False)
    beside = whole
    if weights == "raw":
        beside = run(files, tmp_path, "beside", "--trainer.callbacks.weights=raw")
    expected, found = last(alone), last(beside)
    assert_same({key: found[key] for key in TRAINED}, {key: expected[key] for key in TRAINED})
    left, right = (state["callbacks"]["ResumeCheckpoint"]["random"] for state in (expected, found))
    assert_same(left["torch"], right["torch"])
    assert_same(left["numpy"], right["numpy"])
    assert callback_state(beside)["training"]["decay"]["last_epoch"] == 6


@pytest.mark.slow
def test_the_router_learns_and_is_logged(whole) -> None:
    rows = [row for row in read_rows(whole / "metrics.csv") if row["train/loss"]]
    assert len(rows) == 6
    for name in ("forces", "energy", "sparsity", "guide"):
        assert all(float(row[f"router/{name}"]) >= 0 for row in rows), name
    guides = [float(row["router/guide"]) for row in rows]
    assert guides[-1] < guides[0]
    router = load_router(whole / ROUTER_FILE)
    assert isinstance(router, FTPRouter)
    assert router.levels == 0.4
    weights = router.mlp.state_dict()
    assert_same(dict(callback_state(whole)["training"]["mlp"]), dict(weights))
    assert not torch.equal(weights["0.weight"], FTPRouter(0.4).mlp[0].weight)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_a_stopped_run_goes_on_exactly(files, whole, tmp_path, frozen) -> None:
    """It stops in the middle of an epoch; the router takes every other step."""
    more = ["--trainer.callbacks.every_n_steps=2", f"--trainer.callbacks.freeze_network={frozen}"]
    expected = run(files, tmp_path, "whole", *more)

    given = arguments(files, tmp_path, "killed", *more)
    train_until_killed(parse([*given, "--checkpoint_every_n_steps=1"]), step=3)
    killed = tmp_path / "killed"
    assert last(killed)["global_step"] == 3
    assert (killed / ROUTER_FILE).exists()
    train(parse([*given, "--checkpoint_every_n_steps=1", "--ckpt_path=auto"]))
    assert_same(callback_state(killed), callback_state(expected))
    assert (killed / ROUTER_FILE).read_text() == (expected / ROUTER_FILE).read_text()
    assert_same(last(killed)["state_dict"], last(expected)["state_dict"])
    assert callback_state(killed)["training"]["decay"]["last_epoch"] == 3
    with pytest.raises(InputError, match=r"trained a router with levels 0\.4, this one has 0\.5"):
        train(parse([*given, "--ckpt_path=auto", "--trainer.callbacks.levels=0.5"]))


@pytest.mark.slow
def test_a_frozen_network_stays_as_it_is(files, tmp_path) -> None:
    frozen = run(files, tmp_path, "frozen", "--trainer.callbacks.freeze_network=true")
    start = load_checkpoint(files["start"]).model.state_dict()
    for weights in ("raw", "averaged"):
        left = load_checkpoint(frozen / "checkpoints" / "last.pt", weights).model.state_dict()
        assert_same(dict(left), dict(start))
    first = FTPRouter(0.4).mlp[0].weight
    assert not torch.equal(load_router(frozen / ROUTER_FILE).mlp[0].weight, first)


@pytest.mark.slow
def test_a_frozen_network_trains_the_router_as_train_router_does(files, tmp_path) -> None:
    """One structure, so that the order of batches is no matter."""
    data = write_lmdb(tmp_path / "one.lmdb", [slab("a")])
    more = [f"--data.train={data}", "--trainer.callbacks.freeze_network=true", "--trainer.max_epochs=4"]
    trained = run(files, tmp_path, "one", *more, "--trainer.callbacks.temperature=0")
    router = FTPRouter(0.4)
    batch = Batch.from_data_list([OC20Lmdb(data)[0]])
    model = load_checkpoint(files["start"]).model
    history = train_router(model, router, [batch], RouterTraining(steps=4))
    assert router_to_dict(load_router(trained / ROUTER_FILE)) == router_to_dict(router)
    rows = [row for row in read_rows(trained / "metrics.csv") if row["train/loss"]]
    assert float(rows[-1]["router/forces"]) == pytest.approx(2.5 * history[-1].forces, rel=1e-5)
    assert float(rows[-1]["router/energy"]) == pytest.approx(2.0 * history[-1].energy, rel=1e-5)


@pytest.mark.slow
def test_accumulated_batches_are_one_step(files, tmp_path) -> None:
    more = ["--trainer.accumulate_grad_batches=2", "--trainer.callbacks.steps=2"]
    state = callback_state(run(files, tmp_path, "accumulated", *more))
    assert state["training"]["decay"]["last_epoch"] == 2  # of the run's 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainer.callbacks.levels=[0.4,0.4]"], "levels for 2 blocks but the network has 3"),
        (["--trainer.callbacks.levels=[null,null,null]"], "no block is routed"),
        (["--trainer.callbacks.weights=averaged", "--task.ema_decay=0"], "no averaged weights"),
        (["--model.forces=none", "--init_from=null"], "trained on direct forces"),
        (["--task.backend=compile"], "the backend 'compile' updates all atoms"),
        (["--trainer.max_epochs=-1", "--optim.schedule=constant"], "has no number of steps"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(files, tmp_path, more, message) -> None:
    with pytest.raises(InputError, match=message):
        run(files, tmp_path, "wrong", *more)


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"steps": 0}, {"levels": 1.5}])
def test_settings_are_checked(settings) -> None:
    with pytest.raises(InputError, match=r"is 0: give 1 or more|a level is 1\.5"):
        TrainRouter(**{"levels": 0.4, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["false", "true"])
def test_two_processes_train_the_router_of_one(files, tmp_path, frozen) -> None:
    more = (
        f"--trainer.callbacks.freeze_network={frozen}", "--trainer.callbacks.temperature=0",
        "--model.alpha_drop=0", "--model.drop_path_rate=0", "--trainer.precision=64-true",
    )  # fmt: skip
    one = run(files, tmp_path, "one", *more, "--data.batch_size=4")
    command = arguments(files, tmp_path, "two", *more, "--data.batch_size=2", "--trainer.devices=2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *command],
        env=environment, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = (callback_state(folder)["training"]["mlp"] for folder in (one, tmp_path / "two"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    rows = [read_rows(folder / "metrics.csv")[0] for folder in (one, tmp_path / "two")]
    for name in ("router/forces", "router/guide", "router/sparsity"):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), rel=1e-4), name


def test_the_example_is_read() -> None:
    config = parse(["--config", str(ROOT / "configs" / "pruning" / "router.yaml")])
    (callback,) = config.trainer["callbacks"]
    assert isinstance(callback, TrainRouter)
    assert callback.freeze_network
    assert callback.router.block_levels(config.model.num_layers) == (None, 0.6, 0.6, None)

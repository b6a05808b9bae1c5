"""Adapters that begin with the rounding error of a compact checkpoint, and are trained on it."""

import json
from pathlib import Path

import pytest
import torch
from search_helpers import NORMALIZERS, save_tiny, slabs, tiny_model, write_lmdb

from equiformer2.checkpoint.adapted import merge_adapters
from equiformer2.checkpoint.adapter_files import Adapter, read_adapter
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.cli.main import main
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.model.parametrizations import attach, stored_kinds
from equiformer2.pruning import PruningPlan
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.precision.compact import compact_network
from equiformer2.pruning.precision.plan import PrecisionPlan
from equiformer2.pruning.precision.recovery import adapter_bytes, recover
from equiformer2.training.configuration import parse
from equiformer2.training.run import train


def uniform(precision: str) -> PrecisionPlan:
    return PrecisionPlan.uniform(tiny_model().config, precision)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_maps_lower_the_error_at_the_start(precision: str):
    model, plan = tiny_model(), uniform(precision)
    errors = []
    for rank in (1, 3):
        found = recover(model, plan, rank)
        assert found.error < found.plain_error
        errors.append(found.error)
    assert errors[1] < errors[0]
    # The maps leave no more of each matrix than the plan's own rounding.
    calibration = Calibration(model, NORMALIZERS, slabs())
    plain = calibration.loss(compact_network(model, plan))
    assert stored_kinds(found.network) == stored_kinds(compact_network(model, plan))
    attach(found.network, found.maps)
    assert calibration.loss(found.network) < plain


def test_matrices_of_zeros_have_no_error():
    model = tiny_model()
    name, _ = uniform("int4").modules[0]
    torch.nn.init.zeros_(model.get_submodule(name).weight)
    found = recover(model, PrecisionPlan(((name, "int4"),)), 2)
    assert (found.error, found.plain_error) == (0.0, 0.0)


def test_pruning_comes_first():
    model = tiny_model()
    pruning = PruningPlan.keep_all(model.config).with_block(0, heads=(1,), mmax=1)
    found = recover(model, PrecisionPlan.uniform(model.config, "int4", pruning), 2)
    assert found.network.config == pruning.applied_to(model.config)
    assert found.error < found.plain_error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact checkpoint with its adapter, `small.pt` and `small.adapter.pt`, and data."""
    path = tmp_path_factory.mktemp("recovery")
    save_tiny(path / "dense.pt")
    write_lmdb(path / "data.lmdb", slabs())
    words = ["--checkpoint", path / "dense.pt", "--data", path / "data.lmdb", "--out", path / "small.pt"]
    words += ["--uniform", "int4", "--recover", "3", "--structures", "2"]
    assert main(["prune", "quantize", *map(str, words)]) == 0
    return path


def test_the_command_writes_both_files(folder: Path):
    record = json.loads((folder / "small.pt.json").read_text())["recovery"]
    assert record["adapter"] == "small.adapter.pt"
    assert record["bytes"] == (folder / "small.adapter.pt").stat().st_size
    shapes = {
        name: tuple(each.shape) for name, each in read_adapter(folder / "small.adapter.pt").maps.items()
    }
    assert record["bytes"] <= adapter_bytes(shapes, 3)
    assert record["weight_error"] < record["weight_error_plain"]
    assert record["force_change_eV_A"] < record["plain"]["force_change_eV_A"]
    predictor = Predictor(folder / "small.pt", adapter=folder / "small.adapter.pt")
    dense = Predictor(folder / "dense.pt").predict(slabs())["forces"]
    found = predictor.predict(slabs())["forces"]
    predictor.use_adapter(None)
    alone = predictor.predict(slabs())["forces"]
    assert (found - dense).abs().mean() < (alone - dense).abs().mean()
    merge_adapters(folder / "small.pt", [folder / "small.adapter.pt"], folder / "merged.pt")
    merged = Predictor(folder / "merged.pt").predict(slabs())["forces"]
    assert torch.allclose(merged, found, atol=1e-5)


def factors(adapter: Adapter) -> torch.Tensor:
    maps = [adapter.maps[name] for name in sorted(adapter.maps)]
    return torch.cat([part.detach().flatten() for each in maps for part in (each.left, each.right)])


def arguments(folder: Path, runs: Path, *more: str) -> list[str]:
    data = folder / "data.lmdb"
    return [
        *(f"--runs_dir={runs}", f"--data.train={data}", f"--data.val={data}", "--data.batch_size=2"),
        *(f"--init_from={folder / 'small.pt'}", "--optim.lr=1e-2", "--optim.schedule=constant", "--seed=1"),
        *(
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=-1",
            "--trainer.max_steps=2",
            "--adapter.rank=3",
        ),
        *("--task.ema_decay=0.0", *more),
    ]


def test_training_changes_the_adapter_alone(folder: Path, tmp_path: Path):
    before = sha256(folder / "small.pt"), sha256(folder / "small.adapter.pt")
    start = read_adapter(folder / "small.adapter.pt")
    run = train(parse(arguments(folder, tmp_path, f"--adapter.start={folder / 'small.adapter.pt'}")))
    trained = read_adapter(run / "checkpoints/last_adapter.pt")
    assert trained.base.fingerprint == start.base.fingerprint
    assert trained.replaced == {}
    assert set(trained.maps) == set(start.maps)
    change = (factors(trained) - factors(start)).abs().max()
    assert 0.005 < change < 0.03  # two steps
    assert (sha256(folder / "small.pt"), sha256(folder / "small.adapter.pt")) == before
    # A run that was stopped goes on from what it had trained, not from the start.
    words = arguments(folder, tmp_path / "again", f"--adapter.start={folder / 'small.adapter.pt'}")
    words += ["--checkpoint_every_n_steps=1", "--name=stopped"]
    train(parse([*words, "--trainer.max_steps=1"]))
    run = train(parse([*words, "--ckpt_path=auto"]))
    assert torch.equal(factors(read_adapter(run / "checkpoints/last_adapter.pt")), factors(trained))
    Predictor(folder / "small.pt", adapter=trained).predict(slabs())


def test_a_new_adapter_of_a_compact_checkpoint_holds_no_matrices(folder: Path, tmp_path: Path):
    run = train(parse(arguments(folder, tmp_path, "--adapter.keep=1.0", "--adapter.method=random")))
    adapter = read_adapter(run / "checkpoints/last_adapter.pt")
    assert {name.partition(".")[0] for name in adapter.replaced} == {"energy_block", "force_block"}
    Predictor(folder / "small.pt", adapter=adapter).predict(slabs())


def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_tiny(tmp_path / "other.pt", seed=3)
    common = ["prune", "quantize", "--checkpoint", str(folder / "dense.pt"), "--data"]
    common += [str(folder / "data.lmdb"), "--structures", "2", "--out", str(tmp_path / "a.pt")]
    start = f"--adapter.start={folder / 'small.adapter.pt'}"
    words = arguments(folder, tmp_path, start, f"--init_from={tmp_path / 'other.pt'}")
    with pytest.raises(InputError, match=r"adapter of another network, small\.pt, and not of other\.pt"):
        train(parse(words))
    with pytest.raises(InputError, match=r"adapter\.rank is 0"):
        train(parse([*words, "--adapter.rank=0"]))
    for more, message in [
        (["--uniform", "bf16", "--recover"], "nothing to recover"),
        (["--uniform", "int4", "--recover", "0"], "at least 1"),
        (["--target", "bytes=0.2", "--recover"], "the adapter of --recover may take"),
    ]:
        assert main([*common, *more]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert message in line
    assert not (tmp_path / "a.pt").exists()

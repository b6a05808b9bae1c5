"""A run that trains an adapter: its files, exact resuming, what stays frozen, refusals."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from tiny_checkpoint import write_tiny_checkpoint
from tiny_run import LMDB

from datasets_oc20 import OC20Lmdb
from equiformer2 import Predictor, load_checkpoint
from equiformer2.checkpoint.adapter_files import Adapter, read_adapter
from equiformer2.checkpoint.checkpoint import read_contents
from equiformer2.errors import InputError
from equiformer2.training.configuration import parse
from equiformer2.training.run import train

ARGUMENTS = [
    *("--seed=1", f"--data.train={LMDB}", f"--data.val={LMDB}", "--data.energy_kind=adsorption"),
    *("--data.batch_size=5", "--optim.lr=1e-2", "--optim.schedule=constant", "--trainer.accelerator=cpu"),
    *("--trainer.max_epochs=-1", "--trainer.log_every_n_steps=1", "--adapter.rank=2", "--adapter.keep=0.5"),
    *("--adapter.frames=2", "--checkpoint_every_n_steps=1"),
]


def run(folder: Path, base: Path, name: str, steps: int, *more: str) -> Path:
    words = [f"--runs_dir={folder}", f"--name={name}", f"--init_from={base}", f"--trainer.max_steps={steps}"]
    return train(parse([*ARGUMENTS, *words, *more])) / "checkpoints"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "base.pt")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run of four steps."""
    return run(tmp_path_factory.mktemp("runs"), base, "whole", 4)


def factors(adapter: Adapter) -> torch.Tensor:
    return torch.cat([part.flatten() for each in adapter.maps.values() for part in (each.left, each.right)])


def test_the_result_is_an_adapter_of_the_start(whole: Path, base: Path) -> None:
    assert not list(whole.glob("*st.pt"))
    adapter = read_adapter(whole / "best_adapter.pt")
    assert adapter.base.file == "base.pt"
    assert adapter.kept_share == pytest.approx(0.5, abs=0.01)
    assert adapter.settings["method"] == "snip"
    assert adapter.provenance["step"] == 4
    log = (whole.parent / "log.txt").read_text()
    assert f" {adapter.trainable_parameters:,} trainable parameters" in log
    assert set(adapter.provenance["training_data"]["elements"])
    assert any(bool(each.left.any()) for each in adapter.maps.values())
    for each in adapter.maps.values():
        assert not each.left[~each.left_kept].any()
        assert not each.right[~each.right_kept].any()
    assert all(name.startswith(("energy_block", "force_block")) for name in adapter.replaced)
    frames = [OC20Lmdb(LMDB)[row] for row in (0, 1)]
    plain, adapted = Predictor(base), Predictor(base, adapter=adapter)
    assert not torch.equal(plain.predict(frames)["forces"], adapted.predict(frames)["forces"])


def test_the_state_to_resume_from_leaves_the_network_out(whole: Path, base: Path) -> None:
    state = torch.load(whole / "last.ckpt", weights_only=True)
    numbers = sum(tensor.numel() for tensor in state["state_dict"].values())
    assert numbers < 1.6 * 2 * sum(t.numel() for t in read_contents(base).weights["raw"].values())
    assert not any(name.endswith("original") for name in state["state_dict"])
    assert any(name.startswith("averaged.") for name in state["state_dict"])
    assert state["equiformer2"]["base"] == read_adapter(whole / "last_adapter.pt").base.fingerprint


def test_a_stopped_run_goes_on_exactly(whole: Path, base: Path, tmp_path: Path) -> None:
    run(tmp_path, base, "stopped", 2)
    ended = run(tmp_path, base, "stopped", 4, "--ckpt_path=auto")
    expected, found = read_adapter(whole / "last_adapter.pt"), read_adapter(ended / "last_adapter.pt")
    assert torch.equal(factors(expected), factors(found))
    for name, tensor in expected.replaced.items():
        assert torch.equal(tensor, found.replaced[name])


def test_a_run_is_not_resumed_on_another_network(whole: Path, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    contents = torch.load(base, weights_only=True)
    changed = copy.deepcopy(contents)
    changed["weights"]["raw"]["norm.affine_weight"] += 1
    torch.save(changed, other)
    run(tmp_path, base, "one", 1)
    with pytest.raises(InputError, match="trains an adapter of another network"):
        run(tmp_path, other, "one", 2, "--ckpt_path=last")


def test_the_network_is_that_of_the_start(whole: Path, base: Path) -> None:
    """The configuration need not describe it, and records it."""
    written = yaml.safe_load((whole.parent / "config.yaml").read_text())
    config = load_checkpoint(base).config
    assert written["model"]["num_layers"] == config.num_layers
    assert written["model"]["sphere_channels"] == config.sphere_channels
    again = parse([f"--config={whole.parent / 'config.yaml'}"])
    assert again.adapter.rank == 2
    assert again.adapter.weights == ("*",)


def test_an_adapter_needs_a_network(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs init_from"):
        train(parse([*ARGUMENTS, f"--runs_dir={tmp_path}", "--name=none"]))
    with pytest.raises(InputError, match="matches no weight"):
        run(tmp_path, base, "pattern", 1, "--adapter.weights=[nothing.*]")
    with pytest.raises(InputError, match=r"adapter\.keep"):
        run(tmp_path, base, "keep", 1, "--adapter.keep=2")

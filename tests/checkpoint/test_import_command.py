"""The command `equiformer2 checkpoint import`."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import FIXTURES, load_file
from command_line import run_command

from equiformer2.checkpoint import load_checkpoint


def test_the_native_file_says_the_same_as_the_foreign_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = FIXTURES / "ckpt_v0_ocp_checkpoint.pt", tmp_path / "native.pt"
    assert run_command("checkpoint import", "--checkpoint", source, "--out", out) == 0
    assert "ocp-v0 checkpoint" in capsys.readouterr().out
    for weights in ("raw", "averaged"):
        native, foreign = load_checkpoint(out, weights=weights), load_checkpoint(source, weights=weights)
        assert native.source_format == "equiformer2"
        assert (native.config, native.normalizers) == (foreign.config, foreign.normalizers)
        assert (native.energy_kind, native.available_weights) == ("adsorption", ("raw", "averaged"))
        for name, tensor in foreign.model.state_dict().items():
            assert torch.equal(native.model.state_dict()[name], tensor)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert native.provenance["source_sha256"] == digest
    assert native.provenance["source_file"] == source.name
    assert native.provenance["training_config"]["optim"]["lr_initial"] == 0.0004

    summary = json.loads((tmp_path / "native.pt.json").read_text())
    assert summary["source_sha256"] == digest
    assert summary["weights"] == ["raw", "averaged"]
    assert summary["energy_kind"] == "adsorption"
    assert summary["parameters"] == sum(p.numel() for p in native.model.parameters())
    assert summary["model_config"] == native.config.to_dict()
    assert out.stat().st_size < source.stat().st_size  # constants and training state are left behind


def test_the_kind_of_energy_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = load_file("ckpt_v1_flat_best.pt")
    file["normalizers"]["energy"]["rmsd"] = torch.tensor(1.5)
    torch.save(file, tmp_path / "foreign.pt")
    arguments = ["--checkpoint", tmp_path / "foreign.pt", "--out", tmp_path / "native.pt"]
    assert run_command("checkpoint import", *arguments) == 2
    assert "give --energy-kind adsorption" in capsys.readouterr().err
    assert run_command("checkpoint import", *arguments, "--energy-kind", "total") == 0
    native = load_checkpoint(tmp_path / "native.pt")
    assert native.energy_kind == "total"
    assert native.provenance["energy_kind_from"] == "given on import"


def test_one_set_of_weights_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, both, one = FIXTURES / "ckpt_v0_ocp_checkpoint.pt", tmp_path / "both.pt", tmp_path / "new/one.pt"
    assert run_command("checkpoint import", "--checkpoint", source, "--out", both) == 0
    assert run_command("checkpoint import", "--checkpoint", both, "--out", tmp_path / "copy.pt") == 2
    assert "--weights averaged" in capsys.readouterr().err
    arguments = ["--checkpoint", both, "--weights", "averaged", "--out", one]
    assert run_command("checkpoint import", *arguments) == 0
    before, after = load_checkpoint(both), load_checkpoint(one)
    assert (after.available_weights, after.weights) == (("averaged",), "averaged")
    assert (after.normalizers, after.energy_kind) == (before.normalizers, before.energy_kind)
    assert after.provenance["training_config"] == before.provenance["training_config"]
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor)
    assert one.stat().st_size < 0.6 * both.stat().st_size
    arguments = ["--checkpoint", one, "--weights", "raw", "--out", tmp_path / "raw.pt"]
    assert run_command("checkpoint import", *arguments) == 2
    assert "does not hold raw weights" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["native", "same", "absent", "truncated", "other"])
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    source, out = tmp_path / "source.pt", tmp_path / "out.pt"
    content = (FIXTURES / "ckpt_v1_flat_best.pt").read_bytes()
    if case == "truncated":
        source.write_bytes(content[:-1000])
    elif case == "other":
        torch.save({"x": torch.zeros(2)}, source)
    elif case != "absent":
        source.write_bytes(content)
    if case == "native":
        assert run_command("checkpoint import", "--checkpoint", source, "--out", tmp_path / "first.pt") == 0
        source = tmp_path / "first.pt"
    if case == "same":
        out = source
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert run_command("checkpoint import", "--checkpoint", source, "--out", out) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert str(source) in lines[0]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

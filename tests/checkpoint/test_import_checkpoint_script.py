"""scripts/import_checkpoint.py."""

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoint_helpers import FIXTURES, load_file

from equiformer2.checkpoint import load_checkpoint
from equiformer2.script import run_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "import_checkpoint.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("import_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_native_file_says_the_same_as_the_foreign_one(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = FIXTURES / "ckpt_v0_ocp_checkpoint.pt", tmp_path / "native.pt"
    assert script.main(["--checkpoint", str(source), "--out", str(out)]) == 0
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


def test_the_kind_of_energy_can_be_given(script: ModuleType, tmp_path: Path) -> None:
    file = load_file("ckpt_v1_flat_best.pt")
    file["normalizers"]["energy"]["rmsd"] = torch.tensor(1.5)
    torch.save(file, tmp_path / "foreign.pt")
    arguments = ["--checkpoint", str(tmp_path / "foreign.pt"), "--out", str(tmp_path / "native.pt")]
    with pytest.raises(ValueError, match="give --energy-kind adsorption"):
        script.main(arguments)
    script.main([*arguments, "--energy-kind", "total"])
    native = load_checkpoint(tmp_path / "native.pt")
    assert native.energy_kind == "total"
    assert native.provenance["energy_kind_from"] == "given on import"


@pytest.mark.parametrize("case", ["native", "same", "absent", "truncated", "other"])
def test_bad_input_is_one_line_and_leaves_nothing(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
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
        script.main(["--checkpoint", str(source), "--out", str(tmp_path / "first.pt")])
        source = tmp_path / "first.pt"
    if case == "same":
        out = source
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: script.main(["--checkpoint", str(source), "--out", str(out)]))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert str(source) in lines[0]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

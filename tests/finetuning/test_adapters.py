"""`finetune --adapter` from data to an adapter file, and the commands that take it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import run_command
from tiny_networks import write_checkpoint

from equiformer2 import load_checkpoint
from equiformer2.adapters import AdapterSettings
from equiformer2.checkpoint.adapter_files import read_adapter
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.finetuning.folder import FineTuneSettings
from equiformer2.finetuning.run import fine_tune


@pytest.fixture(scope="module")
def tuned(emt: Path, adsorption_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapter for energies of another kind, with a new last layer of the energy head."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    words = ["--data", emt, "--checkpoint", adsorption_checkpoint, "--out", out, "--reset-head", "--steps", 2]
    words += ["--no-scratch", "--adapter", "--adapter-rank", 2, "--adapter-keep", 0.5]
    assert run_command("finetune", *words) == 0
    return out


def test_the_result_is_an_adapter_of_the_checkpoint(tuned: Path, adsorption_checkpoint: Path) -> None:
    assert not list(tuned.glob("model*.pt"))
    record = json.loads((tuned / "finetune.json").read_text())
    adapter = read_adapter(tuned / "adapter.pt")
    (model,) = record["models"]
    assert model["base_sha256"] == adapter.base.sha256 == sha256(adsorption_checkpoint)
    assert model["trainable_parameters"] == adapter.trainable_parameters
    assert model["bytes"] == (tuned / "adapter.pt").stat().st_size < 100_000
    assert model["kept_share"] == pytest.approx(0.5, abs=0.01)
    assert record["adapter"]["rank"] == 2
    assert "an adapter of rank 2" in " ".join(record["decisions"])
    assert record["energy_kind"] == adapter.energy_kind == "total"
    assert {"energy_block.so3_linear_2.weight", "force_block.proj.weight"} <= set(adapter.replaced)
    assert adapter.provenance["init_from"] == "adsorption.pt"
    assert set(record["references_eV"]) == {"H", "O", "Ni", "Cu", "Pt"}


def test_the_table_is_of_the_checkpoint_with_the_adapter(
    tuned: Path,
    emt: Path,
    adsorption_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Evaluated and predicted by the commands, merged and unmerged."""
    common = ["--checkpoint", adsorption_checkpoint, "--adapter", tuned / "adapter.pt"]
    merged = tmp_path / "merged.pt"
    assert run_command("adapters merge", *common, "--out", merged) == 0
    assert json.loads((tmp_path / "merged.pt.json").read_text())["energy_kind"] == "total"
    assert load_checkpoint(merged).energy_kind == "total"
    judged = tuned / "data" / "judged.lmdb"
    found = []
    for number, words in enumerate((common, ["--checkpoint", merged])):
        out = tmp_path / f"{number}.json"
        assert run_command("evaluate", *words, "--data", judged, "--out", out) == 0
        named = f"with the adapter {tuned / 'adapter.pt'}: " in capsys.readouterr().out
        assert named == (words is common)
        found.append(json.loads(out.read_text()))
        assert run_command("predict", *words, "--data", emt, "--out", tmp_path / f"{number}.npz") == 0
    assert found[0]["adapter_sha256"] == sha256(tuned / "adapter.pt")
    answers = [np.load(tmp_path / f"{number}.npz") for number in (0, 1)]
    for name in ("energy", "forces"):
        assert np.abs(answers[0][name] - answers[1][name]).max() < 1e-6 * max(
            1, np.abs(answers[0][name]).max()
        )
    table = json.loads((tuned / "finetune.json").read_text())["table"]
    after = next(row for row in table if row["network"] == "after")
    (metrics,) = (part["metrics"] for part in found[0]["datasets"].values())
    assert metrics["energy_mae"] == pytest.approx(after["energy_mae_eV"], rel=1e-5)
    assert metrics["forces_mae"] == pytest.approx(after["force_mae_eV_A"], rel=1e-5)


def test_inspect_has_the_keys_of_a_record(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("adapters inspect", tuned / "adapter.pt", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    keys = ("base_sha256", "rank", "kept_share", "trainable_parameters", "bytes", "energy_kind")
    assert set(keys) <= set(record)
    assert {"schema", "command", "commit", "checkpoint_sha256", "seconds"} <= set(record)
    assert record["checkpoint_sha256"] == record["base_sha256"]
    assert (record["rank"], record["bytes"]) == (2, (tuned / "adapter.pt").stat().st_size)


def test_a_relaxation_takes_the_adapter(
    tuned: Path, emt: Path, adsorption_checkpoint: Path, tmp_path: Path
) -> None:
    structure = Path(__file__).parents[1] / "data" / "own_data"
    file = sorted(structure.glob("hfo2_OUTCAR_*.gz"))[0]
    copied = tmp_path / "OUTCAR.gz"
    copied.write_bytes(file.read_bytes())
    out = tmp_path / "relaxed"
    words = ["--checkpoint", adsorption_checkpoint, "--adapter", tuned / "adapter.pt", "--out", out]
    assert run_command("relax", copied, *words, "--steps", 1) in (0, 3)
    record = json.loads((out / "relaxation.json").read_text())
    assert record["energy_kind"] == "total"
    assert record["model"]["adapter_sha256"] == sha256(tuned / "adapter.pt")


def test_wrong_files_are_one_sentence(
    tuned: Path, emt: Path, adsorption_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_checkpoint(tmp_path / "other.pt", "adsorption", max_radius=4.5)
    adapter = tuned / "adapter.pt"
    out = tmp_path / "out.pt"
    cases = (
        ("adapters merge", ["--checkpoint", other, "--adapter", adapter, "--out", out], "another network"),
        (
            "adapters merge",
            ["--checkpoint", adapter, "--adapter", adapter, "--out", out],
            "is an adapter and",
        ),
        (
            "adapters merge",
            ["--checkpoint", adsorption_checkpoint, "--adapter", adsorption_checkpoint, "--out", out],
            "is a checkpoint of a whole network",
        ),
        (
            "adapters merge",
            ["--checkpoint", adsorption_checkpoint, "--adapter", adapter, "--out", adapter],
            "is read as input",
        ),
        ("adapters inspect", [other], "is a checkpoint of a whole network"),
        ("evaluate", ["--checkpoint", other, "--adapter", adapter, "--data", emt], "another network"),
    )
    for command, words, message in cases:
        assert run_command(command, *words) == 2
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(told) == 1
        assert message in told[0]
    assert not out.exists()


def test_what_does_not_go_with_an_adapter(
    emt: Path, adsorption_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", emt, "--checkpoint", adsorption_checkpoint, "--out", tmp_path / "out"]
    for more, message in (
        (["--adapter", "--freeze", 1], "no meaning with --freeze"),
        (["--adapter-rank", 2], "no meaning without --adapter"),
    ):
        assert run_command("finetune", *words, *more) == 2
        assert message in capsys.readouterr().err
    for more, message in (
        (["--adapter", "--adapter-rank", 0], "--adapter-rank is 0"),
        (["--adapter", "--adapter-keep", 0], "adapter.keep is 0"),
        (["--adapter", "--reset-head", "--adapter-weights", "nothing"], "matches no weight"),
    ):
        assert run_command("finetune", *words, *more, "--no-scratch", "--steps", 1) == 2
        assert message in capsys.readouterr().err


def test_a_network_without_forces_gets_none(emt: Path, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base.pt", "adsorption", forces="none")
    settings = FineTuneSettings(
        data=(str(emt),), checkpoint=str(base), out=tmp_path / "out", reset_head=True, steps=1, scratch=False,
        adapter=AdapterSettings(rank=2),
    )  # fmt: skip
    with pytest.raises(InputError, match="an adapter keeps the heads"):
        fine_tune(settings, lambda line: None)


@pytest.mark.slow
def test_a_stopped_command_with_seeds_continues(
    emt: Path, adsorption_checkpoint: Path, tmp_path: Path
) -> None:
    settings = FineTuneSettings(
        data=(str(emt),), checkpoint=str(adsorption_checkpoint), out=tmp_path / "out", reset_head=True,
        steps=1, scratch=False, seeds=2, adapter=AdapterSettings(rank=2),
    )  # fmt: skip
    record = fine_tune(settings, lambda line: None)
    assert [Path(model["file"]).name for model in record["models"]] == ["adapter.pt", "adapter_1.pt"]
    (settings.out / "finetune.json").unlink()
    again = fine_tune(settings, lambda line: None)
    assert again["table"] == record["table"]
    with pytest.raises(InputError, match="other adapter"):
        fine_tune(replace(settings, adapter=None), lambda line: None)
    both = [settings.out / name for name in ("adapter.pt", "adapter_1.pt")]
    words = ["--checkpoint", adsorption_checkpoint, "--adapter", *both, "--out", tmp_path / "mean.pt"]
    assert run_command("adapters merge", *words) == 0
    assert load_checkpoint(tmp_path / "mean.pt").energy_kind == "total"

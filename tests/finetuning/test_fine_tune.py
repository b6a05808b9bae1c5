"""The command from data to table: files, keys, refusals, resuming, seeds, curve, replay."""

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_command
from emt_frames import write_frames
from tiny_networks import TINY
from torch_geometric.data import Data

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint
from equiformer2.checkpoint.checkpoint import load_checkpoint, read_contents
from equiformer2.errors import InputError
from equiformer2.finetuning import run as run_module
from equiformer2.finetuning.folder import FineTuneSettings, OutFolder
from equiformer2.finetuning.run import fine_tune
from equiformer2.inference import Predictor
from equiformer2.pruning import PruningPlan
from equiformer2.pruning.structured.apply import shrink

COLUMNS = {"energy_mae_eV", "force_mae_eV_A"}


def rows(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["data"], row["network"]): row for row in record["table"]}


@pytest.fixture
def tuned(emt: Path, adsorption_checkpoint: Path, tmp_path: Path) -> FineTuneSettings:
    return FineTuneSettings(
        data=(str(emt),), checkpoint=str(adsorption_checkpoint), out=tmp_path / "out", steps=1, scratch=False
    )


@pytest.mark.pictures
def test_everything_in_one_command(
    emt: Path, adsorption_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another kind of energy, two seeds, replay and forgetting; --json is one document."""
    out = tmp_path / "out"
    old = Path(__file__).parents[1] / "fixtures" / "datasets_oc20" / "s2ef_val_20_packed.lmdb"
    words = ["--data", emt, "--checkpoint", adsorption_checkpoint, "--out", out, "--reset-head", "--seeds", 2]
    words += ["--no-scratch"]
    words += ["--steps", 1, "--batch-size", 8, "--replay", old, "--replay-weight", 0.1, "--json"]
    assert run_command("finetune", *words) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record == json.loads((out / "finetune.json").read_text())
    assert {"schema", "command", "commit", "checkpoint_sha256", "seconds"} <= set(record)
    found = rows(record)
    new, forgetting = ("before", "after", "trivial"), ("before", "after")
    assert set(found) == {*(("new", name) for name in new), *(("old", name) for name in forgetting)}
    assert all(row["systems"] == len(row["by_system"]) for row in found.values())
    assert found["new", "before"]["energy_mae_eV"] is None  # of another kind
    assert found["old", "before"]["energy_mae_eV"] is not None
    assert found["old", "after"]["energy_mae_eV"] is None
    assert all(row["force_mae_eV_A"] > 0 for row in found.values())
    assert found["new", "after"]["seeds"] == [0, 1]
    assert found["new", "after"]["force_mae_eV_A_std"] > 0
    assert set(record["references_eV"]) == {"H", "O", "Ni", "Cu", "Pt"}
    assert [Path(model["file"]).name for model in record["models"]] == ["model.pt", "model_1.pt"]
    assert sorted(path.name for path in out.glob("model*.pt")) == ["model.pt", "model_1.pt"]
    assert (out / "parity.png").stat().st_size > 10_000
    assert not any("parity" in training for training in record["trainings"].values())
    assert f"{record['models'][0]['trainable_parameters']:,} trainable parameters" in printed.err
    assert "forces alone" in printed.err
    assert "total energies" in printed.err
    model = load_checkpoint(out / "model.pt")
    assert model.energy_kind == "total"
    assert model.provenance["init_from"] == "adsorption.pt"
    predictor = Predictor(out / "model.pt")
    assert predictor.unseen_elements == []
    assert "surroundings" in predictor.familiarity.known
    assert run_command("finetune", *words) == 2
    assert "is finished" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finished_folder_is_left_alone(tuned: FineTuneSettings) -> None:
    settings = replace(tuned, reset_head=True)
    fine_tune(settings)
    before = (settings.out / "model.pt").read_bytes()
    for change, message in (
        (settings, "is finished"),
        (replace(settings, seed=3), "holds a fine-tuning with other seed"),
    ):
        with pytest.raises(InputError, match=message):
            fine_tune(change)
    assert (settings.out / "model.pt").read_bytes() == before
    with pytest.raises(InputError, match="is read as input"):
        fine_tune(replace(settings, checkpoint=str(settings.out / "model.pt"), overwrite=True))


@pytest.mark.slow
def test_a_stopped_command_continues(
    tuned: FineTuneSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped between two trainings, and judged again: the same numbers as without a stop."""
    settings = replace(tuned, reset_head=True, scratch=True)
    whole = fine_tune(replace(settings, out=tmp_path / "whole"))
    real, calls = run_module.judge, []

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run_module, "judge", stopped)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(settings)
    assert not (settings.out / "finetune.json").exists()
    told: list[str] = []
    record = fine_tune(settings, told.append)
    assert told[0].startswith("continuing")
    for name in COLUMNS:
        assert [row[name] for row in record["table"]] == pytest.approx(
            [row[name] for row in whole["table"]], nan_ok=True
        )


@pytest.mark.parametrize("options", [["--no-scratch"], ["--no-scratch", "--freeze", "all"]])
@pytest.mark.slow
def test_the_same_kind_keeps_the_head(
    copper: Path, total_checkpoint: Path, tmp_path: Path, options: Sequence[str]
) -> None:
    out = tmp_path / "out"
    words = ["--data", copper, "--checkpoint", total_checkpoint, "--out", out, "--steps", 1, *options]
    assert run_command("finetune", *words) == 0
    found = rows(json.loads((out / "finetune.json").read_text()))
    assert set(found) == {("new", "before"), ("new", "after"), ("new", "trivial")}
    assert found["new", "before"]["energy_mae_eV"] is not None
    states = [read_contents(path).weights for path in (total_checkpoint, out / "model.pt")]
    before, after = states[0]["raw"], states[1]["raw"]
    held = torch.equal(before["sphere_embedding.weight"], after["sphere_embedding.weight"])
    assert held == ("--freeze" in options)
    assert not torch.equal(before["norm.affine_weight"], after["norm.affine_weight"])


@pytest.mark.slow
def test_a_finished_folder_is_overwritten_on_request(tuned: FineTuneSettings) -> None:
    fine_tune(replace(tuned, reset_head=True))
    record = fine_tune(replace(tuned, reset_head=True, seed=3, overwrite=True))
    assert record["models"][0]["seed"] == 3


@pytest.mark.slow
def test_a_curve_says_what_more_frames_would_bring(
    copper: Path, total_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--data", copper, "--checkpoint", total_checkpoint, "--out", out, "--steps", 1, "--curve"]
    assert run_command("finetune", *words) == 0
    record = json.loads((out / "finetune.json").read_text())
    assert (out / "curve.png").exists()
    assert {point["network"] for point in record["curve"]["points"]} == {"after", "scratch"}
    printed = capsys.readouterr().out
    assert record["curve"]["sentences"]
    assert all(sentence in printed for sentence in record["curve"]["sentences"])


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Fewer heads in the first block, no attention in the second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EquiformerV2(replace(TINY, num_layers=2, num_heads=2))
    plan = PruningPlan.keep_all(model.config).with_block(0, heads=(1,)).with_block(1, attention=False)
    small = shrink(model, plan)
    save_checkpoint(
        tmp_path / "pruned.pt",
        model=small,
        raw_state=small.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(Normalizer(0.0, 1.0), Normalizer(0.0, 1.0)),
        energy_kind="adsorption",
        provenance={},
    )
    return tmp_path / "pruned.pt"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pruned", "ckpt_v0_ocp_best.pt", "ckpt_v1_hydra_best.pt", "oc20_small"])
def test_the_network_is_that_of_the_checkpoint(copper: Path, pruned: Path, tmp_path: Path, name: str) -> None:
    foreign = Path(__file__).parents[1] / "fixtures" / "checkpoint" / name
    given = str(pruned if name == "pruned" else foreign if foreign.exists() else name)
    settings = FineTuneSettings(
        (str(copper),), given, tmp_path / "out", reset_head=True, steps=1, scratch=False
    )
    fine_tune(settings)
    before, after = read_contents(given).config, read_contents(settings.out / "model.pt").config
    assert replace(after, stress=before.stress) == before


@pytest.mark.slow
def test_energies_alone(frames: list[Data], total_checkpoint: Path, tmp_path: Path) -> None:
    bare = [frame.clone() for frame in frames]
    for frame in bare:
        del frame["forces"]
    path = write_frames(tmp_path / "energies.lmdb", bare)
    settings = FineTuneSettings(
        data=(str(path),), checkpoint=str(total_checkpoint), out=tmp_path / "out", steps=1, scratch=False
    )
    with pytest.raises(InputError, match="--reset-head"):
        fine_tune(settings)
    assert not settings.out.exists()
    record = fine_tune(replace(settings, reset_head=True))
    assert rows(record)["new", "after"]["force_mae_eV_A"] is None
    assert not Predictor(settings.out / "model.pt").has_forces


WRONG = [
    (["--checkpoint", "missing.pt"], "missing.pt"),
    (["--data", "missing.lmdb"], "missing.lmdb"),
    (["--freeze", "7"], "the network has 1 block"),
    (["--seeds", "0"], "--seeds is 0"),
    (["--max-minutes", "-1"], "--max-minutes is -1"),
    (["--replay-weight", "2"], "--replay-weight has no meaning without --replay"),
    (["--device", "cuda:99"], "the device 'cuda:99' cannot be used on this machine"),
    (["--wandb-offline"], "--wandb-project"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_options_are_one_sentence_with_status_2(
    emt: Path,
    adsorption_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    given = {"--data": str(emt), "--checkpoint": str(adsorption_checkpoint), "--out": str(tmp_path / "out")}
    given |= {options[0]: options[1] if len(options) > 1 else ""}
    words = [word for pair in given.items() for word in pair if word]
    assert run_command("finetune", *words, "--reset-head") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_files_are_no_checkpoint(emt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    words = ["--data", emt, "--checkpoint", tmp_path / "other.pt", "--out", tmp_path / "out"]
    assert run_command("finetune", *words) == 2
    assert "is no equiformer2, OCP or fairchem v1 checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2])
def test_one_frame_is_refused_and_one_system_said_to_be_easy(
    frames: list[Data],
    adsorption_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    count: int,
) -> None:
    path = write_frames(tmp_path / "few.lmdb", frames[:count])
    words = ["--data", path, "--checkpoint", adsorption_checkpoint, "--out", tmp_path / "out", "--reset-head"]
    status = run_command("finetune", *words, "--steps", 1, "--no-scratch")
    printed = capsys.readouterr()
    assert status == (2 if count == 1 else 0)
    assert (
        "one frame can be learned by heart" if count == 1 else "the easy case"
    ) in printed.err + printed.out


def test_a_file_in_the_way_is_not_replaced(tuned: FineTuneSettings) -> None:
    tuned.out.mkdir()
    (tuned.out / "model.pt").write_text("mine")
    with pytest.raises(InputError, match="exists already and was not written by this command"):
        fine_tune(replace(tuned, reset_head=True))
    assert (tuned.out / "model.pt").read_text() == "mine"


@pytest.mark.parametrize("task", [None, "{}", "not json"])
def test_overwrite_replaces_results_of_this_command_alone(tuned: FineTuneSettings, task: str | None) -> None:
    (tuned.out / "data").mkdir(parents=True)
    (tuned.out / "data" / "years_of_work").write_text("mine")
    if task is not None:
        (tuned.out / "task.json").write_text(task)
    with pytest.raises(InputError, match="exists already and was not written by this command"):
        fine_tune(replace(tuned, reset_head=True, overwrite=True))
    assert (tuned.out / "data" / "years_of_work").read_text() == "mine"


def test_an_overwrite_that_was_killed_can_be_given_again(tuned: FineTuneSettings) -> None:
    with OutFolder(replace(tuned, reset_head=True)).open():
        for name in ("prepared.json", "model.pt", "runs/one/log", "data/part"):
            (tuned.out / name).parent.mkdir(parents=True, exist_ok=True)
            (tuned.out / name).write_text("{}")

    def die_at(event: str, _: object) -> None:
        if event == "shutil.rmtree":
            os._exit(9)

    def begin_anew() -> None:
        sys.addaudithook(die_at)
        with OutFolder(replace(tuned, seed=5, overwrite=True)).open():
            pass

    process = multiprocessing.get_context("fork").Process(target=begin_anew)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert (tuned.out / "data" / "part").exists()
    with OutFolder(replace(tuned, seed=5, overwrite=True)).open() as continues:
        assert not continues
    assert sorted(path.name for path in tuned.out.iterdir()) == [".lock", "task.json"]


def test_results_are_not_written_among_the_data(tuned: FineTuneSettings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of which all files are read as input: give another --out"):
        fine_tune(replace(tuned, data=(str(tmp_path),), out=tmp_path / "deep" / "tuned"))
    assert not (tmp_path / "deep").exists()

"""The checkpoints before the last one, and that a full disk costs none of them."""

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from command_line import run_script_file

from equiformer2.errors import InputError
from equiformer2.files import write_bytes
from equiformer2.training.configuration import parse
from equiformer2.training.folder import RunFolder
from equiformer2.training.resume_state import OlderCheckpoints, read_resume_state
from equiformer2.training.run import train
from tests.disk import full_disk


def save(last: Path, before: int, step: int, count: int) -> None:
    """What the callback does at `step` when it has saved at `before` before."""
    OlderCheckpoints(last, count).keep(before)
    write_bytes(last, str(step).encode())
    OlderCheckpoints(last, count).remove_surplus()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    last, steps = tmp_path / "last.ckpt", [0, 8, 9, 10, 12]
    for before, step in pairwise(steps):
        save(last, before, step, 2)
    assert contents(tmp_path) == {"last.ckpt": "12", "step_10.ckpt": "10", "step_9.ckpt": "9"}
    assert OlderCheckpoints(tmp_path / "last.ckpt", 0).latest() == tmp_path / "step_10.ckpt"
    # Going back to an older one and on from there: those written last stay.
    save(last, 9, 11, 2)
    save(last, 11, 13, 2)
    assert contents(tmp_path) == {"last.ckpt": "13", "step_11.ckpt": "11", "step_10.ckpt": "10"}


def test_time_decides_not_the_step(tmp_path: Path) -> None:
    """A run that went back to step 3 and on from there has written 5 after 20, 30 and 40."""
    for seconds, step in enumerate((20, 30, 40, 5)):
        path = tmp_path / f"step_{step}.ckpt"
        path.write_text(str(step))
        os.utime(path, (1000 + seconds, 1000 + seconds))
    assert OlderCheckpoints(tmp_path / "last.ckpt", 0).latest() == tmp_path / "step_5.ckpt"
    OlderCheckpoints(tmp_path / "last.ckpt", 2).remove_surplus()
    assert contents(tmp_path) == {"step_40.ckpt": "40", "step_5.ckpt": "5"}
    OlderCheckpoints(tmp_path / "last.ckpt", 1).remove_surplus()
    assert contents(tmp_path) == {"step_5.ckpt": "5"}


def test_one_is_enough_for_who_says_so(tmp_path: Path) -> None:
    for before, step in ((0, 8), (8, 9)):
        save(tmp_path / "last.ckpt", before, step, 0)
    assert contents(tmp_path) == {"last.ckpt": "9"}


def test_without_hard_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "last.ckpt", 0, 8, 1)
    save(tmp_path / "last.ckpt", 8, 9, 1)
    assert contents(tmp_path) == {"last.ckpt": "9", "step_8.ckpt": "8"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_arguments: list[str]) -> Path:
    """Three steps, a checkpoint after each and none lost by a full disk yet."""
    own = [f"--runs_dir={tmp_path_factory.mktemp('runs')}", "--name=run", "--checkpoint_every_n_steps=1"]
    limits = ["--trainer.max_epochs=-1", "--trainer.max_steps=3", "--trainer.limit_val_batches=0"]
    return train(parse([*tiny_arguments, *own, *limits]))


def test_a_run_keeps_two(run: Path) -> None:
    found = {path.name: read_resume_state(path)["global_step"] for path in run.glob("checkpoints/*.ckpt")}
    assert found == {"last.ckpt": 3, "step_2.ckpt": 2}


def test_a_damaged_checkpoint_leads_to_the_one_before(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    with (folder / "checkpoints/last.ckpt").open("r+b") as file:
        file.truncate(5000)
    before = folder / "checkpoints/step_2.ckpt"
    with pytest.raises(
        InputError, match=f"truncated, .* go on from the one before it give --ckpt_path {before}"
    ):
        read_resume_state(folder / "checkpoints/last.ckpt")
    # In its own folder, with all that the run has left there.
    assert RunFolder(folder, str(before)).resume_from == before


@pytest.mark.slow
def test_what_a_killed_process_was_writing_is_removed(run: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", None)
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / ".last.ckpt.123.tmp").write_bytes(b"half")
    with folder.open():
        assert not list(folder.checkpoints.iterdir())


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(
    run: Path, tmp_path: Path, tiny_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A write that fails half way: one sentence, and the run goes on from where it was when there is room."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    size = (folder / "checkpoints/last.ckpt").stat().st_size
    own = [f"--runs_dir={tmp_path}", "--name=run", "--checkpoint_every_n_steps=1", "--ckpt_path=last"]
    limits = ["--trainer.max_epochs=-1", "--trainer.max_steps=5", "--trainer.limit_val_batches=0"]
    with full_disk(size // 2):
        status = run_script_file("train", *tiny_arguments, *own, *limits)
    written = capsys.readouterr().err
    errors = [line for line in written.splitlines() if line.startswith("error:")]
    assert status == 2, written[-2000:]
    assert len(errors) == 1
    assert "last.ckpt" in errors[0]
    assert "Traceback" not in written
    assert not list(folder.rglob("*.tmp"))
    for path, step in ((folder / "checkpoints/last.ckpt", 3), (folder / "checkpoints/step_2.ckpt", 2)):
        assert torch.load(path, weights_only=True)["global_step"] == step
    train(parse([*tiny_arguments, *own, *limits]))
    assert read_resume_state(folder / "checkpoints/last.ckpt")["global_step"] == 5

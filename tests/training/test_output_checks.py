"""`equiformer2 evaluate` and `predict` look at where their results go before they do anything else."""

from pathlib import Path

import pytest
from command_line import run_command


@pytest.mark.parametrize(
    ("script", "option", "target", "message"),
    [
        ("evaluate", "--out", "file/out.json", "out.json cannot be written, because file is no folder"),
        ("evaluate", "--out", "folder", "folder is a folder: name a file to write"),
        ("evaluate", "--figures", "file", "file cannot be written, because file is no folder"),
        ("predict", "--out", "file/deep/out.npz", "out.npz cannot be written, because file is no folder"),
        ("predict", "--out", "folder.npz", "folder.npz is a folder: name a file to write"),
        ("predict", "--out", "out.csv", "predictions are written as .npz or .json"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    option: str,
    target: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("folder").mkdir()
    Path("folder.npz").mkdir()
    # Neither checkpoint nor data are there: the place is told all the same.
    arguments = ["--checkpoint", "absent.pt", "--data", "absent.lmdb", option, target]
    assert run_command(script, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1

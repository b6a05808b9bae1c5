"""Which folders a new run may take."""

from pathlib import Path

import pytest

from equiformer2.errors import InputError
from equiformer2.training.folder import RunFolder


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """What a run leaves that was killed before its first logged step."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "log.txt").write_text("earlier\n")
    (folder / "metrics.csv").write_text("step,train/loss\n")
    (folder / "wandb_id.txt").write_text("0123abcd")
    (folder / "checkpoints" / ".last.ckpt.17.tmp").write_bytes(b"half")
    return folder


def test_a_run_that_never_began_is_replaced(stub: Path) -> None:
    with RunFolder(stub, None).open():
        pass
    assert "earlier" not in (stub / "log.txt").read_text()


@pytest.mark.parametrize(
    "name", ["checkpoints/last.ckpt", "checkpoints/best.pt", "figures/loss.png", "notes"]
)
def test_anything_else_is_kept(stub: Path, name: str) -> None:
    (stub / name).parent.mkdir(exist_ok=True)
    (stub / name).write_bytes(b"x")
    hint = ", or continue it with --ckpt_path auto" if name == "checkpoints/last.ckpt" else ""
    with pytest.raises(InputError, match=f"run holds a run already: choose another name{hint}$"):
        RunFolder(stub, None)


def test_a_logged_step_is_kept(stub: Path) -> None:
    (stub / "metrics.csv").write_text("step,train/loss\n0,1.5\n")
    with pytest.raises(InputError, match="run holds a run already"):
        RunFolder(stub, None)


def test_resuming_keeps_the_log(stub: Path) -> None:
    (stub / "checkpoints" / "last.ckpt").write_bytes(b"x")
    with RunFolder(stub, "last").open():
        pass
    assert (stub / "log.txt").read_text().startswith("earlier")


def test_a_run_that_is_going_on_keeps_its_folder(stub: Path) -> None:
    with RunFolder(stub, None).open():
        (stub / "log.txt").write_text("going on\n")
        with (
            pytest.raises(InputError, match="run holds a run that is still going on: choose another name"),
            RunFolder(stub, None).open(),
        ):
            pass
        assert (stub / "log.txt").read_text() == "going on\n"
    with RunFolder(stub, None).open():
        pass

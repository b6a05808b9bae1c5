"""Commands that the demo runs beside each other in processes of their own."""

from pathlib import Path

import pytest

from equiformer2.demo.background import BackgroundCommand, wait_for
from equiformer2.errors import InputError


@pytest.mark.slow
def test_a_command_that_fails_is_one_sentence(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "inspect.log"
    words = ["data", "inspect", "--data", tmp_path / "absent.lmdb", "--out", tmp_path / "report"]
    with BackgroundCommand(words, log, beside=1) as command, pytest.raises(InputError) as error:
        wait_for([command], "inspecting", 5)
    assert not command.runs
    assert "status 2" in str(error.value)
    assert "absent.lmdb" in str(error.value)
    assert str(log) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_command_that_succeeds_leaves_its_output_in_the_log(tmp_path: Path) -> None:
    with BackgroundCommand(["--version"], tmp_path / "log", beside=2) as command:
        wait_for([command], "asking", 5)
    assert (tmp_path / "log").read_text().startswith("equiformer2")


def test_no_command_outlives_its_context(tmp_path: Path) -> None:
    def stopped_at_once() -> None:
        with BackgroundCommand(["doctor"], tmp_path / "log", beside=1) as command:
            commands.append(command)
            raise KeyboardInterrupt

    commands: list[BackgroundCommand] = []
    with pytest.raises(KeyboardInterrupt):
        stopped_at_once()
    assert not commands[0].runs

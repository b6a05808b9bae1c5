"""Files appear whole or not at all, and errors name them."""

import json
import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, whole_file, write_bytes, write_json
from tests.disk import full_disk


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert write_json(path, {"energy": 1.0}) == path
    with pytest.raises(InputError, match=r"record\.json was not written.*not finite"):
        write_json(path, {"energy": float("nan")})
    with pytest.raises(TypeError):
        write_bytes(path, "text")  # type: ignore[arg-type]

    with full_disk(4), pytest.raises(OSError, match=r"'.*/record\.json'"):
        write_json(path, {"energy": 2.0})
    assert json.loads(path.read_text()) == {"energy": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with pytest.raises(FileNotFoundError, match=r"'.*/new/file'"):  # not the name of a temporary file
        write_bytes(path, b"1")
    assert not path.parent.exists()
    write_bytes(path, b"1", make_folder=True)
    assert path.read_bytes() == b"1"


def test_a_stream_is_there_only_after_its_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"1")
        assert not path.exists()
    with pytest.raises(OSError, match=r"^something else$"):
        _fail_in_the_middle(path)
    assert path.read_bytes() == b"1"
    assert list(tmp_path.iterdir()) == [path]


def _fail_in_the_middle(path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"2")
        raise OSError("something else")


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match=r"'.*/taken'$"):
        write_bytes(tmp_path / "taken", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_target_is_checked_before_the_work(tmp_path: Path) -> None:
    check_target(tmp_path / "new" / "folder" / "out.json")
    check_target(tmp_path, is_folder=True)
    check_target(tmp_path / "new", is_folder=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    check_target(tmp_path / "file")
    with pytest.raises(InputError, match="is a folder: name a file to write"):
        check_target(tmp_path)
    for path, is_folder in ((tmp_path / "file" / "a" / "out.json", False), (tmp_path / "file", True)):
        with pytest.raises(InputError, match=r"cannot be written, because .*/file is no folder"):
            check_target(path, is_folder)


def test_a_folder_without_permission_to_write_is_refused() -> None:
    """As an ordinary user: root may write everywhere."""

    def check(folder: str, answer: Connection) -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            check_target(Path(folder) / "out.json")
        except InputError as error:
            answer.send(str(error))
        answer.close()

    # Beside, not in, pytest's folders, which other users cannot enter.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=check, args=(folder, sender))
        process.start()
        sender.close()
        message = receiver.recv()
        process.join()
        os.chmod(folder, 0o755)
    assert f"{folder} is not writable" in message


@pytest.mark.parametrize("content", ["", '{"a": ', "[1]", "null", "\x00"])
def test_a_broken_file_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"record\.json is broken .*: remove it"):
        read_json(path)
    write_json(path, {"a": [1.5, None]})
    assert read_json(path) == {"a": [1.5, None]}

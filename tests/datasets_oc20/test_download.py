"""Downloads that are cut, refused, misled and stopped."""

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run_command
from http_server import Server
from tar_files import GOOD, make_tar

from datasets_oc20 import DataError
from datasets_oc20.archives import unpack
from datasets_oc20.catalogue import LMDB_BYTES_PER_FRAME
from datasets_oc20.disk_space import Need
from datasets_oc20.download import Download, Retry, fetch
from datasets_oc20.partial_file import PartialFile, md5_sum
from tests.disk import full_disk

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SUM = hashlib.md5(CONTENT).hexdigest()


class Waits:
    """A sleep that takes no time and remembers."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def get(
    server: Server,
    target: Path,
    md5: str | None = SUM,
    attempts: int = 4,
    waits: Callable[[float], None] | None = None,
) -> Download:
    retry = Retry(attempts=attempts, sleep=waits or Waits())
    return fetch(server.url, target, md5, retry, timeout=5, show_progress=False)


def test_a_whole_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Server(CONTENT) as server:
        done = get(server, tmp_path / "file.tar")
    assert (tmp_path / "file.tar").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.tar"]
    assert (done.size, done.fetched, done.md5) == (len(CONTENT), len(CONTENT), SUM)
    assert server.requests == [None]
    assert not caplog.records


def test_cuts_are_resumed_where_they_happened(tmp_path: Path) -> None:
    waits = Waits()
    with Server(CONTENT, ["cut:1000000", "cut:500000", "cut:0"]) as server:
        done = get(server, tmp_path / "file.tar", waits=waits)
    assert server.requests == [None, "bytes=1000000-", "bytes=1500000-", "bytes=1500000-"]
    assert md5_sum(tmp_path / "file.tar") == SUM
    assert done.fetched == len(CONTENT)
    # New bytes came before the first two cuts, none before the third: only that one waits longer.
    assert waits.seconds == [1.0, 1.0, 2.0]


def test_waits_grow_and_obey_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    waits = Waits()
    with Server(CONTENT, [500, 502, 504, 503, 429]) as server:
        get(server, tmp_path / "file.tar", attempts=6, waits=waits)
    assert waits.seconds == [1.0, 2.0, 4.0, 7.0, 16.0]  # 503 came with Retry-After: 7
    assert "the server answers 503 (0 B of an unknown size); trying again in 7 s." in caplog.text
    retry = Retry(attempts=9, first_wait=10.0, longest_wait=25.0, sleep=waits)
    waits.seconds.clear()
    with Server(CONTENT, [500, 500, 500, 500]) as server:
        fetch(server.url, tmp_path / "other.tar", SUM, retry, show_progress=False)
    assert waits.seconds == [10.0, 20.0, 25.0, 25.0]


def test_giving_up_keeps_what_has_arrived(tmp_path: Path) -> None:
    target = tmp_path / "file.tar"
    with Server(CONTENT, ["cut:1000000", 503, 503, 503]) as server:
        with pytest.raises(DataError, match=r"4 times .*503.* 976\.6 KiB"):
            get(server, target)
        assert not target.exists()
        done = get(server, target)  # a later run of the program
        assert server.requests[-1] == "bytes=1000000-"
    assert target.read_bytes() == CONTENT
    assert done.fetched == len(CONTENT) - 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["file.tar"]


def test_no_server(tmp_path: Path) -> None:
    with Server(CONTENT) as server:
        pass
    with pytest.raises(DataError, match=r"4 times .*ConnectionError"):
        get(server, tmp_path / "file.tar")


def test_a_server_that_ignores_ranges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "file.tar"
    with Server(CONTENT, ["cut:1000000", "no ranges"]) as server:
        get(server, target)
    assert target.read_bytes() == CONTENT
    assert "sends the file from its beginning" in caplog.text
    # One that is always cut before it gets farther than ever must not go on for ever.
    script = ["cut:1000000", *["no ranges cut"] * 9]
    stuck = [step if step != "no ranges cut" else _start_again for step in script]
    with Server(CONTENT, stuck) as server, pytest.raises(DataError, match="failed 4 times in a row"):
        get(server, tmp_path / "other.tar")
    assert len(server.requests) == 4


def _start_again(request: Any) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(CONTENT)))
    request.end_headers()
    request.wfile.write(CONTENT[:800_000])
    request.close_connection = True


def test_a_wrong_range_is_not_appended(tmp_path: Path) -> None:
    with Server(CONTENT, ["cut:1000000", "wrong range"]) as server:
        get(server, tmp_path / "file.tar", md5=None)
    assert server.requests == [None, "bytes=1000000-", None]
    assert (tmp_path / "file.tar").read_bytes() == CONTENT


def test_wrong_bytes_are_found_and_removed(tmp_path: Path) -> None:
    wrong = bytearray(CONTENT)
    wrong[1_234_567] ^= 1
    with Server(bytes(wrong)) as server:
        with pytest.raises(DataError, match=f"instead of {SUM}; .*again"):
            get(server, tmp_path / "file.tar")
        assert not list(tmp_path.iterdir())
        server.content = CONTENT
        get(server, tmp_path / "file.tar")
    assert md5_sum(tmp_path / "file.tar") == SUM


@pytest.mark.parametrize("etag", ['"v2"', None])
def test_another_version_on_the_server_starts_again(tmp_path: Path, etag: str | None) -> None:
    target = tmp_path / "file.tar"
    with Server(CONTENT, ["cut:1000000", 404]) as server, pytest.raises(DataError, match="answers 404"):
        get(server, target)
    newer = np.random.default_rng(1).bytes(2_000_000)
    with Server(newer, etag=etag) as server:
        server.url = _same_address(target, server.url)
        get(server, target, md5=None)
    assert target.read_bytes() == newer


def _same_address(target: Path, url: str) -> str:
    """Pretend that the part came from `url`, as it would when a server changes its file."""
    note = target.with_name(target.name + ".part.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "url": url}))
    return url


def test_a_whole_part_whose_size_was_not_known(tmp_path: Path) -> None:
    target = tmp_path / "file.tar"
    with Server(CONTENT) as server:
        with PartialFile(target, server.url) as part:
            part.write(CONTENT)
        get(server, target)
    assert server.requests == [f"bytes={len(CONTENT)}-"]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("step", "message"),
    [(404, "answers 404 Not Found; check the address"), ("html", "answers with a web page")],
)
def test_answers_that_no_patience_helps(tmp_path: Path, step: Any, message: str) -> None:
    waits = Waits()
    with Server(CONTENT, [step]) as server, pytest.raises(DataError, match=message):
        get(server, tmp_path / "file.tar", waits=waits)
    assert not waits.seconds
    with pytest.raises(DataError, match="ftp://x/y: cannot be downloaded"):
        fetch("ftp://x/y", tmp_path / "y", show_progress=False)


def test_an_unknown_sum_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Server(CONTENT, ["no size"]) as server:
        done = get(server, tmp_path / "file.tar", md5=None)
    assert done.md5 is None
    assert "file.tar: no MD5 sum is known for this file, so it cannot be checked." in caplog.text


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    target, part = tmp_path / "file.tar", tmp_path / "file.tar.part"
    part.write_bytes(b"mine")
    with Server(CONTENT) as server:
        with pytest.raises(DataError, match=r"file\.tar\.part: was not made by this program"):
            get(server, target)
        part.rename(target)
        with pytest.raises(DataError, match=r"MD5 sum is .+ it was left alone"):
            get(server, target)
        assert target.read_bytes() == b"mine"
        target.write_bytes(CONTENT)
        assert get(server, target).fetched == 0
    assert not server.requests


def test_one_download_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "file.tar"
    with Server(CONTENT) as server:
        with (
            PartialFile(target, server.url),
            pytest.raises(DataError, match=r"\.part: another process is writing"),
        ):
            get(server, target)
        get(server, target)


def test_a_full_disk_is_no_reason_to_try_again(tmp_path: Path) -> None:
    def waits(seconds: float) -> None:
        raise AssertionError(f"a wait of {seconds} s for another try")

    with Server(CONTENT) as server, full_disk(1_500_000), pytest.raises(OSError, match="too large"):
        get(server, tmp_path / "file.tar", SUM, 4, waits)
    assert (tmp_path / "file.tar.part").stat().st_size <= 1_500_000


def test_a_killed_download_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "file.tar"

    def stall(request: Any) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(CONTENT)))
        request.send_header("ETag", '"v1"')
        request.end_headers()
        request.wfile.write(CONTENT[:2_000_000])
        request.wfile.flush()
        time.sleep(5)

    with Server(CONTENT, [stall]) as server:
        process = multiprocessing.get_context("fork").Process(target=get, args=(server, target))
        process.start()
        part = target.with_name("file.tar.part")
        for _ in range(500):
            if part.exists() and part.stat().st_size:
                break
            time.sleep(0.01)
        process.kill()
        process.join()
        have = part.stat().st_size
        assert have > 0
        assert not target.exists()
        get(server, target)
    assert server.requests == [None, f"bytes={have}-"]
    assert target.read_bytes() == CONTENT


def download(*arguments: object) -> int:
    """Exit status of `equiformer2 data download`."""
    return run_command("data download", *arguments)


def test_command_from_address_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = make_tar(tmp_path / "file.tar", *GOOD).read_bytes()
    out, md5 = tmp_path / "oc20", hashlib.md5(archive).hexdigest()
    with Server(archive, ["no ranges"]) as server:
        assert download("--url", server.url, "--md5", md5.upper(), "--out", out) == 0
    printed = capsys.readouterr()
    assert "file.tar: 100%" in printed.err
    assert "3 files, 16 B; 0 were there already" in printed.out
    assert (out / "a" / "b" / "0.extxyz.xz").read_bytes() == b"frames"
    report = json.loads((out / "file.tar.json").read_text())
    assert report["md5"] == md5
    assert report["unpacked"]["data_folders"] == [str(out / "a" / "b")]


def test_command_checks_the_space_before_it_uses_the_net(
    tmp_path: Path, free: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "s2ef", "--split", "2M", "--out", tmp_path / "new"]
    free(10 << 30)
    assert download(*arguments) == 2
    sentence = capsys.readouterr().err
    for part in ("archive 3.4 GiB", "unpacked files 3.4 GiB", "LMDB files 10."):
        assert part in sentence
    assert not (tmp_path / "new").exists()
    free(100 << 30)
    assert download(*arguments, "--dry-run") == 0
    assert "MD5 953474cb93f0b08cdc523399f03f7c36" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_going_on_needs_no_room_for_files_that_are_there(
    tmp_path: Path, free: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "oc20"
    out.mkdir()
    archive = make_tar(out / "file.tar", *GOOD)
    with Server(archive.read_bytes()) as server:
        arguments = ["--url", server.url, "--md5", md5_sum(archive), "--out", out]
        free(15)  # the files have 16 bytes
        assert download(*arguments) == 2
        assert "unpacked files 16 B" in capsys.readouterr().err
        free(16)
        assert download(*arguments) == 0
        free(0)
        assert download(*arguments) == 0
    later = [Need("LMDB files", out, LMDB_BYTES_PER_FRAME)]
    free(LMDB_BYTES_PER_FRAME)
    assert unpack(archive, out, show_progress=False, later=later).already_there == 3
    free(LMDB_BYTES_PER_FRAME - 1)
    with pytest.raises(DataError, match=r"LMDB files 5\.4 KiB"):
        unpack(archive, out, show_progress=False, later=later)


def test_command_refuses_options_that_do_not_belong_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (
        ["--task", "s2ef"],
        ["--task", "is2re", "--split", "2M"],
        ["--task", "s2ef", "--split", "2M", "--md5", SUM],
        ["--url", "http://127.0.0.1:9/x.tar", "--split", "2M"],
        ["--url", "http://127.0.0.1:9/"],
        ["--url", "http://127.0.0.1:9/x.tar", "--md5", SUM[:-1]],
    ):
        assert download(*wrong, "--out", tmp_path) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())

"""Releases in shards: runs that are killed, resumed, or begun with other options."""

import json
import logging
import multiprocessing
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from command_line import run_command
from oc20_files import assert_same, frame_text

from datasets_oc20 import DataError, OC20Lmdb
from datasets_oc20.locking import exclusive
from datasets_oc20.preprocess import PreprocessOptions, PreprocessReport, preprocess
from datasets_oc20.shards import preprocess_shards

FILES, FRAMES = 12, 8


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release as its archive unpacks: a folder in a folder, chunks of mixed systems."""
    folder = tmp_path_factory.mktemp("release") / "s2ef_train_1K" / "s2ef_train_1K"
    folder.mkdir(parents=True)
    (folder.parent / "README").write_text("read me")
    for chunk in range(FILES):
        frames = [frame_text(natoms=30, energy=-20.0 - k, seed=chunk * FRAMES + k) for k in range(FRAMES)]
        (folder / f"{chunk}.extxyz").write_text("".join(frames))
        index = "".join(f"random{k % 3},frame{chunk * FRAMES + k},{-19.5 - k}\n" for k in range(FRAMES))
        (folder / f"{chunk}.txt").write_text(index)
    return folder.parent


@pytest.fixture
def release(unpacked: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(unpacked, tmp_path / unpacked.name))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shards_hold_what_one_file_holds(
    release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    preprocess(release, tmp_path / "one.lmdb", num_workers=1)
    with caplog.at_level(logging.INFO, logger="datasets_oc20"):
        report = preprocess_shards(release, tmp_path / "out", 5, num_workers=2)
    assert report == PreprocessReport(files=FILES, read=FILES * FRAMES, written=FILES * FRAMES)
    assert len(list((tmp_path / "out").glob("*.lmdb"))) == 5
    one, many = OC20Lmdb(tmp_path / "one.lmdb"), OC20Lmdb(tmp_path / "out")
    assert len(one) == len(many) == FILES * FRAMES
    for index in range(len(one)):
        assert_same(one[index], many[index])
    assert "edge_index" not in many[0]
    assert many.energy_kind == "adsorption"
    rates = [record.message for record in caplog.records if "together" in record.message]
    assert len(rates) == 5
    assert rates[-1].endswith("0 shards and about 0 min to go")
    counts = json.loads((tmp_path / "out" / "data.0000.json").read_text())
    assert counts["report"]["read"] == len(OC20Lmdb(tmp_path / "out" / "data.0000.lmdb"))


def test_the_number_of_workers_does_not_change_the_files(release: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        preprocess_shards(release, tmp_path / str(workers), 4, num_workers=workers)
    shards_of = [sorted((tmp_path / name).glob("*.lmdb")) for name in ("1", "3")]
    assert [path.read_bytes() for path in shards_of[0]] == [path.read_bytes() for path in shards_of[1]]


def test_killed_at_any_moment_and_going_on(release: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = preprocess_shards(release, whole, 6, num_workers=1)
    killed_before_the_end = 0
    for finished in range(4):
        process = multiprocessing.get_context("fork").Process(
            target=preprocess_shards, args=(release, out, 6), kwargs={"num_workers": 2}
        )
        process.start()
        while process.is_alive() and not (
            (out / "plan.json").exists() and len(list(out.glob("data.*.json"))) >= finished
        ):
            time.sleep(0.001)
        process.kill()
        process.join()
        killed_before_the_end += process.exitcode == -signal.SIGKILL
        for path in out.glob("data.*.lmdb"):  # files under their final names are whole
            assert path.read_bytes() == (whole / path.name).read_bytes()
            assert len(OC20Lmdb(path)) > 0
    assert killed_before_the_end >= 2
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("data.*.json")}
    assert preprocess_shards(release, out, 6, num_workers=2) == expected
    assert names(out) == names(whole)
    for path in whole.glob("*.lmdb"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times  # none was written again


def test_only_missing_shards_are_written(
    release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in out.glob("data.*.json")}

    out = tmp_path / "out"
    expected = preprocess_shards(release, out, 6, num_workers=1)
    whole = {path.name: path.read_bytes() for path in out.glob("*.lmdb")}
    before = times()
    (out / "data.0001.lmdb").write_bytes(whole["data.0001.lmdb"][:5000])  # truncated
    (out / "data.0002.lmdb").unlink()
    (out / "data.0003.json").unlink()  # killed between the shard and its counts
    for name in (".data.0004.lmdb.77.tmp", ".data.0004.json.77.tmp", ".plan.json.77.tmp"):
        (out / name).write_bytes(b"half")
    (out / "notes.txt").write_text("mine")
    with caplog.at_level(logging.INFO, logger="datasets_oc20"):
        assert preprocess_shards(release, out, 6, num_workers=1) == expected
    after = times()
    assert {name for name in after if after[name] != before[name]} == {
        f"data.000{number}.json" for number in (1, 2, 3)
    }
    assert "3 of 6 shards are there already" in caplog.text
    assert {path.name: path.read_bytes() for path in out.glob("*.lmdb")} == whole
    assert not list(out.glob(".*.tmp"))
    assert (out / "notes.txt").read_text() == "mine"
    assert preprocess_shards(release, out, 6, num_workers=1) == expected
    assert times() == after


def test_a_folder_begun_for_something_else(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preprocess_shards(release, out, 3, num_workers=1)
    with pytest.raises(DataError, match=r"plan\.json: .*other shards; .*new folder"):
        preprocess_shards(release, out, 4, num_workers=1)
    with pytest.raises(DataError, match="begun with other options"):
        preprocess_shards(release, out, 3, PreprocessOptions(max_energy=None), num_workers=1)
    (release / release.name / "x.extxyz").write_text("")
    (release / release.name / "x.txt").write_text("")
    with pytest.raises(DataError, match="begun with other raw files; name a new folder"):
        preprocess_shards(release, out, 3, num_workers=1)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "data.0000.lmdb").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"data\.0000\.lmdb: was not made"):
        preprocess_shards(release, stranger, 3, num_workers=1)
    assert (stranger / "data.0000.lmdb").read_bytes() == b"mine"


def test_one_run_at_a_time(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (
        exclusive(out / ".lock", out),
        pytest.raises(DataError, match="out: another process is writing here"),
    ):
        preprocess_shards(release, out, 3, num_workers=1)
    assert preprocess_shards(release, out, 3, num_workers=1).written == FILES * FRAMES


@pytest.mark.parametrize("workers", [1, 2])
def test_a_wrong_file_keeps_the_good_shards(release: Path, tmp_path: Path, workers: int) -> None:
    out, wrong = tmp_path / "out", release / release.name / "7.extxyz"
    text = wrong.read_text()
    wrong.write_text(text[:-100])
    with pytest.raises(DataError, match=r"7\.extxyz, frame 7: "):
        preprocess_shards(release, out, FILES, num_workers=workers)
    assert not [name for name in names(out) if name.endswith(".tmp")]
    made = {path.stem for path in out.glob("*.lmdb")}
    assert 0 < len(made) < FILES
    assert made == {path.stem for path in out.glob("data.*.json")}
    wrong.write_text(text)
    assert preprocess_shards(release, out, FILES, num_workers=workers).written == FILES * FRAMES
    # A raw file that is another than before: its shard alone is made again.
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.lmdb")}
    wrong.write_text(text.replace("energy=-23.0", "energy=-23.25"))
    preprocess_shards(release, out, FILES, num_workers=workers)
    changed = {path.name for path in out.glob("*.lmdb") if path.stat().st_mtime_ns != times[path.name]}
    assert len(changed) == 1
    shard = out / changed.pop()
    assert OC20Lmdb(shard)[3].energy.item() == -0.75
    wrong.write_text(text.replace("energy=-23.0", "energy=-23.50"))  # of the same size
    preprocess_shards(release, out, FILES, num_workers=workers)
    assert OC20Lmdb(shard)[3].energy.item() == -1.0


def test_a_killed_worker_is_an_error(release: Path, tmp_path: Path) -> None:
    def kill_a_worker() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.001)
        workers[0].kill()

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    with pytest.raises(OSError, match="worker process was killed"):
        preprocess_shards(release, tmp_path / "out", FILES, num_workers=2)
    killer.join()
    preprocess_shards(release, tmp_path / "out", FILES, num_workers=2)
    assert len(OC20Lmdb(tmp_path / "out")) == FILES * FRAMES


def test_filters_that_leave_nothing(release: Path, tmp_path: Path) -> None:
    # Chunk 0 has adsorption energies of 100 eV: its shard is empty, and no file is made of it.
    index = release / release.name / "0.txt"
    index.write_text("".join(f"random0,frame{k},-120\n" for k in range(FRAMES)))
    for _ in range(2):
        report = preprocess_shards(release, tmp_path / "out", FILES, num_workers=1)
        assert report.removed_energy == FRAMES
        assert len(list((tmp_path / "out").glob("*.lmdb"))) == FILES - 1
    with pytest.raises(DataError, match=r"no frame of .* passes the filters"):
        preprocess_shards(release, tmp_path / "none", 2, PreprocessOptions(max_force=1e-6), num_workers=1)
    with pytest.raises(DataError, match="shards is 0"):
        preprocess_shards(release, tmp_path / "none", 0)
    with pytest.raises(DataError, match="leave the shards away"):
        preprocess_shards(release, tmp_path / "none", 2, PreprocessOptions(later_fraction=0.2))


def test_command(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "lmdb"
    options = ["--data", release, "--out", out, "--shards", 3, "--num-workers", 1]
    assert run_command("data preprocess", *options) == 0
    assert f"96 of 96 frames of 12 files to {out}" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["written"] == 96
    assert len(OC20Lmdb(out)) == 96


def test_command_with_a_list_of_systems_that_names_none(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xde\xc0")
    for options, message in (
        (["--systems", ""], "must name a system"),
        (["--systems-file", tmp_path / "empty.txt"], "must name a system"),
        (["--systems-file", tmp_path / "binary.txt"], "not a text file"),
        (["--systems-file", tmp_path / "empty.txt", "--systems", "a"], "not both"),
    ):
        out = tmp_path / "x.lmdb"
        assert run_command("data preprocess", "--data", release, "--out", out, *options) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.lmdb"))

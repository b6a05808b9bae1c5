"""LMDB files of others: what LMDB reads is read, and no damage ends the process."""

import multiprocessing
import os
import random
from pathlib import Path

import lmdb
import pytest
from oc20_files import VAL_20

from datasets_oc20 import OC20Lmdb
from datasets_oc20.errors import DataError
from datasets_oc20.lmdb_file import LmdbFile, open_lmdb


def _write(path: Path, engine: int | None = None) -> dict[bytes, bytes]:
    options = {} if engine is None else {"lib_version": engine}
    try:
        environment = lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 26, **options)
    except (TypeError, lmdb.Error):
        pytest.skip("this lmdb has one engine")
    source = random.Random(0)
    items = {}
    with environment.begin(write=True) as transaction:
        for index in range(1500):
            key = str(index).encode() + b"x" * source.choice((0, 1, 30))
            size = 2_000_000 if index == 7 else source.choice((0, 1, 7, 100, 1500, 5000))
            items[key] = source.randbytes(size)
            transaction.put(key, items[key])
    environment.close()
    return items


@pytest.mark.parametrize("engine", [None, 0, 1])
def test_reads_what_lmdb_wrote(engine: int | None, tmp_path: Path) -> None:
    items = _write(tmp_path / "a.lmdb", engine)
    file = LmdbFile(tmp_path / "a.lmdb")
    assert file.entries() == len(items)
    assert all(file.get(key) == value for key, value in items.items())
    assert [file.get(key) for key in (b"", b"nope", b"\xff" * 9)] == [None] * 3


def test_cut_while_it_is_open(tmp_path: Path) -> None:
    items = _write(tmp_path / "a.lmdb")
    file = LmdbFile(tmp_path / "a.lmdb")
    os.truncate(tmp_path / "a.lmdb", 8192)
    with pytest.raises(DataError, match=r"a\.lmdb: .*changed"):
        [file.get(key) for key in items]


def test_a_file_written_anew_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    _write(path)
    first = open_lmdb(path)
    assert open_lmdb(path) is first
    path.write_bytes(VAL_20.read_bytes())
    assert open_lmdb(path) is not first


def _read_damaged(folder: str, trials: int, seed: int, results: "multiprocessing.SimpleQueue[int]") -> None:
    """In a child: change bytes in the headers of pages, read everything; the number of files refused."""
    content, source, refused = VAL_20.read_bytes(), random.Random(seed), 0
    for trial in range(trials):
        damaged = bytearray(content)
        for _ in range(source.choice((1, 2, 8))):
            page = source.randrange(len(content) // 4096)
            place = source.randrange(0, 96) if source.random() < 0.7 else source.randrange(4096)
            damaged[page * 4096 + place] = source.randrange(256)
        path = Path(folder, f"{trial}.lmdb")
        path.write_bytes(damaged)
        try:
            dataset = OC20Lmdb(path)
            for index in range(len(dataset)):
                dataset[index]
        except DataError as error:
            refused += str(path) in str(error)
        path.unlink()
    results.put(refused)


@pytest.mark.parametrize("trials", [10, pytest.param(400, marks=pytest.mark.slow)])
def test_no_changed_page_ends_the_process(trials: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[int] = context.SimpleQueue()
    child = context.Process(target=_read_damaged, args=(str(tmp_path), trials, trials, results))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert results.get() > 0


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (os.mkfifo, "named pipe"),
        (lambda path: path.symlink_to(path), "circle"),
        (lambda path: path.symlink_to("/dev/zero"), "device"),
        (lambda path: (path.mkdir(), (path / "data.mdb").write_bytes(b"x")), r"name .*data\.mdb"),
    ],
)
def test_what_is_no_file(make: object, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    make(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=rf"a\.lmdb: .*{expected}"):
        open_lmdb(path)

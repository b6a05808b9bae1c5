"""The C++ library: made once, loaded again, refused with a reason."""

import _ctypes
import os
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from equiformer2.kernels.cpu import cache, library

# A compiler that needs no time: it says what it is called with and copies some library to the last argument.
FAKE = """#!/bin/sh
case "$*" in *--version*) echo 1; exit;; esac
echo "$@" >> "{log}"
for target; do :; done
head -c 100 "{library}" > "$target"
sleep {seconds}
tail -c +101 "{library}" >> "$target"
"""


class Calls:
    """What a fake compiler was called with, so far."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __len__(self) -> int:
        return len(self.log.read_text().splitlines())

    def __str__(self) -> str:
        return self.log.read_text()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache and a temporary folder of its own, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    library._library.cache_clear()
    yield
    library._library.cache_clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Callable[..., Calls]":
    """Sets CXX to a fake compiler; what is returned lists its calls."""
    if not hasattr(_ctypes, "__file__"):
        pytest.skip("Python has no library to copy")

    def install(arguments: str = "", seconds: float = 0, content: str = "") -> Calls:
        script, log = tmp_path / "fake compiler", tmp_path / "calls"
        log.touch()
        script.write_text(FAKE.format(log=log, library=content or _ctypes.__file__, seconds=seconds))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", f"'{script}' {arguments}")
        return Calls(log)

    return install


def reason() -> str | None:
    """As in a new process."""
    library._library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return library.why_missing()


@pytest.mark.parametrize("given", ["no-such-compiler", "no-such-compiler -O2", "'g++"])
def test_without_a_compiler(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", given)
    assert "no C++ compiler was found" in str(reason())


def test_that_auto_is_slower_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match=r"'auto' is the slower 'torch': no C\+\+ compiler"):
        library.why_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.why_missing()


def test_with_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo 1;; *) echo "out of space" >&2; exit 1;; esac\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "could not compile the CPU kernels: out of space" in str(reason())
    assert not list((tmp_path / "cache" / "equiformer2").iterdir())


def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = []

    def compile_(command: list[str], openmp: Path | None, target: Path) -> None:
        compiled.append(target)
        source = tmp_path / "empty.c"
        source.write_text("void gather_rotate_float32(void) {}\n")
        subprocess.run([*command, "-x", "c", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)

    if library.compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(library, "_compile", compile_)
    assert library.why_missing() is None
    library._library.cache_clear()
    assert library.why_missing() is None
    assert len(compiled) == 1
    assert compiled[0].parent == tmp_path / "cache" / "equiformer2"
    assert library.function("gather_rotate", torch.float32) is not None


def test_a_compiler_with_arguments(fake: Callable[..., Calls]) -> None:
    calls = fake("-O1 '-DNAME=two words'")
    assert reason() is None
    assert str(calls).startswith("-O1 -DNAME=two words -O3 ")
    fake("-O2")
    assert reason() is None
    assert len(calls) == 2  # a library of its own
    assert reason() is None
    assert len(calls) == 2


def test_a_damaged_library_is_made_again_once(fake: Callable[..., Calls], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no library\n" * 20)
    calls = fake(content=str(text))
    assert "could not be compiled or loaded" in str(reason())
    assert len(calls) == 1
    (kept,) = (tmp_path / "cache" / "equiformer2").iterdir()
    assert kept.read_text() == text.read_text()
    fake()
    assert reason() is None
    assert len(calls) == 2
    assert reason() is None
    assert len(calls) == 2


def test_two_compilers_at_once(fake: Callable[..., Calls], tmp_path: Path) -> None:
    """The library is there whole or not at all, and nothing else stays behind."""
    fake(seconds=0.2)
    command, target = library.compiler(), tmp_path / "kernels-1.so"
    assert command is not None
    threads = [threading.Thread(target=library._compile, args=(command, None, target)) for _ in range(2)]
    for thread in threads:
        thread.start()
    whole, sizes = Path(_ctypes.__file__).stat().st_size, set()
    while any(thread.is_alive() for thread in threads):
        if target.exists():
            sizes.add(target.stat().st_size)
        time.sleep(0.01)
    assert sizes | {target.stat().st_size} == {whole}
    assert [path.name for path in tmp_path.iterdir() if ".so" in path.name] == ["kernels-1.so"]


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "equiformer2"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert cache.cache_folder().parent == tmp_path / "temporary"


@pytest.mark.parametrize("missing", ["unwritable", "homeless"])
def test_without_a_cache_the_temporary_folder_keeps_libraries(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    if missing == "unwritable":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
    folder = cache.cache_folder()
    assert folder == tmp_path / "temporary" / f"equiformer2-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache.cache_folder() == folder


@pytest.mark.parametrize("bad", ["link", "writable", "foreign"])
def test_a_temporary_folder_of_others_is_not_used(
    bad: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A new one takes its place, which goes with the process."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    at_exit: list[tuple[object, ...]] = []
    monkeypatch.setattr(cache.atexit, "register", lambda *call, **_: at_exit.append(call))
    shared = tmp_path / "temporary" / f"equiformer2-{os.getuid()}"
    if bad == "link":
        (tmp_path / "elsewhere").mkdir()
        shared.symlink_to(tmp_path / "elsewhere")
    else:
        shared.mkdir(mode=0o700)
    if bad == "writable":
        shared.chmod(0o720)
    if bad == "foreign":
        owner = os.getuid()
        monkeypatch.setattr(cache, "_candidates", lambda: [shared])
        monkeypatch.setattr(cache.os, "getuid", lambda: owner + 1)
    folder = cache.cache_folder()
    assert folder != shared
    assert folder.parent == shared.parent
    assert at_exit == [(cache.shutil.rmtree, folder)]


def test_old_libraries_go(tmp_path: Path, fake: Callable[..., Calls]) -> None:
    folder = tmp_path / "cache" / "equiformer2"
    folder.mkdir(parents=True, mode=0o700)
    days = {"kernels-old.so": 91, "kernels-new.so": 89, "a.so.part": 2, "b.so.part": 0, "other": 1000}
    for name, age in days.items():
        (folder / name).touch()
        os.utime(folder / name, times=(time.time() - 86400 * age,) * 2)
    fake()
    assert reason() is None
    (made,) = {path.name for path in folder.iterdir()} - set(days)
    assert {path.name for path in folder.iterdir()} == {made, "kernels-new.so", "b.so.part", "other"}
    os.utime(folder / made, times=(0, 0))
    assert reason() is None  # loaded again: in use
    cache.remove_unused(folder)
    assert (folder / made).exists()


@pytest.mark.parametrize(
    ("device", "dtype", "lmax", "reason"),
    [
        ("cuda", torch.float32, 6, "run on a CPU, not on cuda"),
        ("cpu", torch.float16, 6, "not float16"),
        ("cpu", torch.float32, 9, "up to lmax = 8, not 9"),
    ],
)
def test_what_it_does_not_do(device: str, dtype: torch.dtype, lmax: int, reason: str) -> None:
    assert reason in str(library.why_not(torch.device(device), dtype, lmax))

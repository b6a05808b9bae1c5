"""The C++ libraries: compiled once, loaded again, refused with a reason."""

import _ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from equiformer2.kernels.cpu import library
from equiformer2.kernels.cpu.library import LIBRARIES, KernelLibraries, Unit, cache_folder

CPU = torch.device("cpu")
UNITS = Unit.of_network(torch.float32, 2, 1)
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
    """Calls of a fake compiler, so far."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __len__(self) -> int:
        return len(self.log.read_text().splitlines())

    def __str__(self) -> str:
        return self.log.read_text()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache and a temporary folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path / "temporary")
    yield
    tempfile.tempdir = before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The cache's folder, which need not exist."""
    return tmp_path / "cache" / "equiformer2"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Calls]:
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
    """Reason why a new process cannot have the kernels of a network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return KernelLibraries().unavailable_reason(CPU, torch.float32, 2, 1)


@pytest.mark.parametrize("given", ["no-such-compiler", "no-such-compiler -O2", "'g++"])
def test_without_a_compiler(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", given)
    assert "no C++ compiler was found" in str(reason())


def test_that_auto_is_slower_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    libraries = KernelLibraries()
    with pytest.warns(RuntimeWarning, match=r"'auto' is the slower 'torch': no C\+\+ compiler"):
        libraries.unavailable_reason(CPU, torch.float32, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        libraries.unavailable_reason(CPU, torch.float32, 2, 1)
        libraries.unavailable_reason(CPU, torch.float64, 4, 2)


def test_with_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo 1;; *) echo "out of space" >&2; exit 1;; esac\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "could not compile the CPU kernels: out of space" in str(reason())
    assert {path.name for path in folder.iterdir()} <= {"kernels.lock"}


def test_said_at_once_and_compiled_once(
    fake: Callable[..., Calls], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = fake()
    assert reason() is None
    (line,) = capfd.readouterr().err.splitlines()
    for part in ("compiling CPU kernels", "fake compiler", f"{len(UNITS)} of", " s, ", str(folder)):
        assert part in line
    assert len(calls) == len(UNITS) == len(list(folder.glob("kernels-*.so")))
    assert reason() is None
    assert len(calls) == len(UNITS)
    assert capfd.readouterr().err == ""


def test_libraries_are_compiled_for_what_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    """One for each source, type and range of orders, with the macros that say so; others on first use."""
    compiler = library.Compiler.find()
    if compiler is None:
        pytest.skip(library.NO_COMPILER)
    stub, script, log = tmp_path / "stub.c", tmp_path / "compiler", tmp_path / "calls"
    stub.write_text("".join(f"void {name}(void) {{}}\n" for name in library.SOURCES))
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo 1; exit;; esac\necho "$@" >> "{log}"\n'
        f'for target; do :; done\n{compiler.name} -x c -shared -fPIC "{stub}" -o "$target"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    libraries, calls = KernelLibraries(), Calls(log)
    assert libraries.unavailable_reason(CPU, torch.float32, 6, 2) is None
    assert len(calls) == 4
    for source, lowest, highest in (
        ("gather_rotate", 0, 3),
        ("sphere_activation", 2, 2),
        ("sphere_points", 6, 6),
    ):
        (line,) = (line for line in str(calls).splitlines() if f"{source}.cpp" in line)
        for macro in (
            "ARITHMETIC=float",
            "OPERAND=float",
            f"LOWEST_ORDER={lowest}",
            f"HIGHEST_ORDER={highest}",
        ):
            assert f"-D{macro} " in line
    # Another precision: all that the network needs at once.
    libraries.function("gather_rotate", torch.bfloat16, 2)
    assert len(calls) == 8
    assert str(calls).count("-DOPERAND=bf16") == 4
    for kernel, order in (
        ("rotate_sum_backward", 1),
        ("sphere_activation", 2),
        ("to_points", 6),
        ("from_points", 6),
    ):
        libraries.function(kernel, torch.bfloat16, order)
    assert len(calls) == 8
    # A block with other orders than the network.
    libraries.function("to_points", torch.bfloat16, 5)
    assert len(calls) == 9
    libraries.function("rotate_sum", torch.bfloat16, 4)
    assert "-DLOWEST_ORDER=0 -DHIGHEST_ORDER=8" in str(calls).splitlines()[-1]


def test_a_compiler_with_arguments(fake: Callable[..., Calls]) -> None:
    calls = fake("-O1 '-DNAME=two words'")
    assert reason() is None
    assert str(calls).startswith("-O1 -DNAME=two words -O3 ")
    fake("-O2")
    assert reason() is None
    assert len(calls) == 2 * len(UNITS)  # libraries of its own
    assert reason() is None
    assert len(calls) == 2 * len(UNITS)


def test_damaged_libraries_are_made_again_once(
    fake: Callable[..., Calls], tmp_path: Path, folder: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("no library\n" * 20)
    calls = fake(content=str(text))
    assert "could not be compiled or loaded" in str(reason())
    assert len(calls) == len(UNITS)
    assert {path.read_text() for path in folder.glob("kernels-*.so")} == {text.read_text()}
    fake()
    assert reason() is None
    assert len(calls) == 2 * len(UNITS)
    assert reason() is None
    assert len(calls) == 2 * len(UNITS)


def test_two_at_once_compile_once(fake: Callable[..., Calls], folder: Path) -> None:
    """A library is there whole or not at all, and nothing else stays behind."""
    calls, results = fake(seconds=0.2), []
    threads = [
        threading.Thread(target=lambda: results.append(KernelLibraries().load(UNITS))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    sizes = set()
    while any(thread.is_alive() for thread in threads):
        sizes |= {path.stat().st_size for path in folder.glob("kernels-*.so")}
        time.sleep(0.01)
    assert results == [None, None]
    assert sizes <= {Path(_ctypes.__file__).stat().st_size}
    assert len(calls) == len(UNITS)
    assert {path.suffix for path in folder.iterdir()} == {".so", ".lock"}


def test_waits_for_another_process_until_it_is_killed(
    fake: Callable[..., Calls], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = fake()
    folder.mkdir(parents=True, mode=0o700)
    hold = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(folder / "kernels.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        thread = threading.Thread(target=lambda: KernelLibraries().load(UNITS))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert len(calls) == 0
        assert "waiting for another process" in capfd.readouterr().err
        other.kill()
    thread.join(30)
    assert len(calls) == len(UNITS)


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert cache_folder().parent == tmp_path / "temporary"


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
    folder = cache_folder()
    assert folder == tmp_path / "temporary" / f"equiformer2-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder


@pytest.mark.parametrize("bad", ["link", "writable", "foreign"])
def test_a_temporary_folder_of_others_is_not_used(
    bad: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A new one takes its place, which goes with the process."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    at_exit: list[tuple[object, ...]] = []
    monkeypatch.setattr(library.atexit, "register", lambda *call, **_: at_exit.append(call))
    if bad == "foreign":
        owner = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    shared = tmp_path / "temporary" / f"equiformer2-{os.getuid()}"
    if bad == "link":
        (tmp_path / "elsewhere").mkdir()
        shared.symlink_to(tmp_path / "elsewhere")
    else:
        shared.mkdir(mode=0o700)
    if bad == "writable":
        shared.chmod(0o720)
    folder = cache_folder()
    assert folder != shared
    assert folder.parent == shared.parent
    assert at_exit == [(shutil.rmtree, folder)]


def test_old_libraries_go(fake: Callable[..., Calls], folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    days = {"kernels-old.so": 91, "kernels-new.so": 89, "a.so.part": 2, "b.so.part": 0, "other": 1000}
    for name, age in days.items():
        (folder / name).touch()
        os.utime(folder / name, times=(time.time() - 86400 * age,) * 2)
    fake()
    assert reason() is None
    made = {path.name for path in folder.iterdir()} - set(days) - {"kernels.lock"}
    assert len(made) == len(UNITS)
    assert {path.name for path in folder.iterdir()} - made - {"kernels.lock"} == {
        "kernels-new.so",
        "b.so.part",
        "other",
    }
    for name in made:
        os.utime(folder / name, times=(0, 0))
    assert reason() is None  # loaded again: in use
    library.remove_unused(folder)
    assert all((folder / name).exists() for name in made)


@pytest.mark.parametrize(
    ("device", "dtype", "lmax", "reason"),
    [
        ("cuda", torch.float32, 6, "run on a CPU, not on cuda"),
        ("cpu", torch.float16, 6, "not float16"),
        ("cpu", torch.float32, 9, "up to lmax = 8, not 9"),
    ],
)
def test_what_it_does_not_do(device: str, dtype: torch.dtype, lmax: int, reason: str) -> None:
    assert reason in str(LIBRARIES.unavailable_reason(torch.device(device), dtype, lmax, 2))

"""Compiled libraries of the C++ kernels: built on first use, kept in the user's cache.

A library holds one source file for one type of GEMM operands and a range of orders m, so that a network
waits only for what it runs (one to two seconds of one core each), and several are compiled at once. Its name
is made of the sources, the compiler, the flags and the processor.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

logger = logging.getLogger(__name__)

HEADERS = ("common.h", "edges.h", "sphere.h")
#: Source file (without `.cpp`) of every kernel.
SOURCES = {
    "gather_rotate": "gather_rotate",
    "gather_rotate_backward": "gather_rotate",
    "rotate_sum": "rotate_sum",
    "rotate_sum_backward": "rotate_sum",
    "sphere_activation": "sphere_activation",
    "to_points": "sphere_points",
    "from_points": "sphere_points",
}
# The machine's own instructions: a library is made where it runs, and its name says for which processor.
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
#: Types that the operands of the GEMMs may have, with their names in C++ and those of the arithmetic.
DTYPES = {
    torch.float32: ("float", "float"),
    torch.float64: ("double", "double"),
    torch.bfloat16: ("bf16", "float"),
}
#: Highest degree that the kernels can be compiled for (`max_degree` in common.h).
LMAX = 8
#: Days after which a library that nothing has loaded is removed.
DAYS_KEPT = 90
NO_COMPILER = "no C++ compiler was found (install g++ or clang++, or set CXX)"

# The kernels for edges hold the orders up to this one, which the paper's networks use, or all of them.
_COMMON_ORDER = 3
# What a compiler that was killed has left behind.
_DAYS_UNFINISHED = 1
# After this time (s) another process that compiles is taken for stuck.
_LONGEST_BUILD = 600.0
# For the estimate that is printed: seconds of one core per library.
_SECONDS_EACH = 2.0


class Unit(NamedTuple):
    """One library.

    Attributes:
        source: name of the source file, one of the values of `SOURCES`.
        dtype: type of the operands of the GEMMs.
        lowest: lowest order m that it is compiled for.
        highest: highest order m.
    """

    source: str
    dtype: torch.dtype
    lowest: int
    highest: int

    @classmethod
    def of(cls, kernel: str, dtype: torch.dtype, order: int) -> "Unit":
        """The library that holds `kernel` for operands of `dtype` and the highest order `order`."""
        source = SOURCES[kernel]
        if source.startswith("sphere"):
            return cls(source, dtype, order, order)
        return cls(source, dtype, 0, _COMMON_ORDER if order <= _COMMON_ORDER else LMAX)

    @classmethod
    def of_network(cls, dtype: torch.dtype, lmax: int, mmax: int) -> list["Unit"]:
        """Libraries of a network of degree `lmax` whose messages have orders up to `mmax`."""
        orders = {"gather_rotate": mmax, "rotate_sum": mmax, "sphere_activation": mmax, "to_points": lmax}
        return [cls.of(kernel, dtype, order) for kernel, order in orders.items()]

    @property
    def name(self) -> str:
        """`sphere_points-float32-m4`."""
        return f"{self.source}-{str(self.dtype).removeprefix('torch.')}-m{self.highest}"

    def definitions(self) -> list[str]:
        """Macros that the source file expects."""
        operand, arithmetic = DTYPES[self.dtype]
        values = {
            "ARITHMETIC": arithmetic,
            "OPERAND": operand,
            "LOWEST_ORDER": self.lowest,
            "HIGHEST_ORDER": self.highest,
        }
        return [f"-D{name}={value}" for name, value in values.items()]


class Compiler:
    """A C++ compiler that is installed.

    Args:
        command: its path and first arguments.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.name = shlex.join(command)
        # torch's own OpenMP: a second one would run a second set of threads against the first.
        lib = Path(torch.__file__).parent / "lib"
        folders = (lib, lib.parent.parent / "torch.libs")
        self._openmp = [str(p) for folder in folders for p in sorted(folder.glob("lib*omp*.so*"))][:1]

    @classmethod
    def find(cls) -> "Compiler | None":
        """The compiler that the variable CXX names, else g++ or clang++, or None without one."""
        try:
            given = shlex.split(os.environ.get("CXX", ""))
        except ValueError:  # a quotation mark too many
            return None
        for name, *arguments in [given] if given else [["g++"], ["clang++"]]:
            if path := shutil.which(name):
                return cls([path, *arguments])
        return None

    @functools.cached_property
    def version(self) -> str:
        """First line that the compiler prints with `--version`."""
        return self._version.partition("\n")[0]

    @functools.cached_property
    def _version(self) -> str:
        return self._run([*self.command, "--version"])

    @functools.cached_property
    def _processor(self) -> str:
        """Instructions of the processor: a home folder may be shared by different machines."""
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            return next(line for line in lines if line.startswith(("flags", "Features")))
        except (OSError, StopIteration):
            return f"{platform.machine()} {platform.processor()} {platform.node()}"

    def digest(self, unit: Unit) -> str:
        """A hash of everything that the library of `unit` depends on."""
        here = Path(__file__).parent
        parts = [*self.command, self._version, *FLAGS, *self._openmp, self._processor, *unit.definitions()]
        parts += [(here / name).read_text(encoding="utf-8") for name in (*HEADERS, f"{unit.source}.cpp")]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def compile(self, unit: Unit, target: Path) -> None:
        """Write the library `target`, whole or not at all.

        Raises:
            subprocess.CalledProcessError: the compiler refuses.
            OSError: it cannot be run, or the file cannot be written.
        """
        source = str(Path(__file__).parent / f"{unit.source}.cpp")
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so.part")
        os.close(handle)
        try:
            self._run(
                [*self.command, *FLAGS, *unit.definitions(), source, "-fopenmp", *self._openmp, "-o", name]
            )
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)

    @staticmethod
    def _run(command: list[str]) -> str:
        return subprocess.run(
            command, check=True, capture_output=True, encoding="utf-8", errors="replace"
        ).stdout


class KernelLibraries:
    """The libraries that this process has loaded; those that are missing are compiled.

    Threads may ask at the same time. Processes wait for each other, so that each library is compiled once.
    """

    def __init__(self) -> None:
        self._loaded: dict[Unit, ctypes.CDLL] = {}
        self._functions: dict[tuple[str, torch.dtype, int], ctypes._NamedFuncPointer] = {}
        self._reasons: dict[tuple[str | None, torch.dtype, int, int], str | None] = {}
        self._degrees: tuple[int, int] | None = None  # of the latest network
        self._lock = threading.RLock()

    def unavailable_reason(
        self, device: torch.device, dtype: torch.dtype, lmax: int, mmax: int
    ) -> str | None:
        """Reason why a network cannot use the kernels, as half a sentence, or None if it can.

        Asking compiles what the network needs, unless it is in the cache; a warning says once that a CPU
        is slower without.

        Args:
            device: place of the parameters.
            dtype: type of the parameters.
            lmax: highest degree L.
            mmax: highest order M of the messages.
        """
        if device.type != "cpu":
            return f"its kernels run on a CPU, not on {device.type}"
        if dtype not in DTYPES:
            names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
            return f"its kernels take {names}, not {str(dtype).removeprefix('torch.')}"
        if lmax > LMAX:
            return f"its kernels go up to lmax = {LMAX}, not {lmax}"
        asked = os.environ.get("CXX"), dtype, lmax, mmax
        with self._lock:
            self._degrees = lmax, mmax
            if asked not in self._reasons:
                reason = self.load(Unit.of_network(dtype, lmax, mmax))
                if reason is not None and reason not in self._reasons.values():
                    warnings.warn(
                        "the C++ kernels cannot be used, so that the backend 'auto' is the slower 'torch': "
                        f"{reason}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                self._reasons[asked] = reason
            return self._reasons[asked]

    def function(self, kernel: str, dtype: torch.dtype, order: int) -> "ctypes._NamedFuncPointer":
        """A kernel.

        Args:
            kernel: its name, one of `SOURCES`.
            dtype: type of the operands of the GEMMs.
            order: highest order m that it is called with.

        Raises:
            RuntimeError: its library cannot be compiled, although others could.
        """
        known = self._functions.get((kernel, dtype, order))
        if known is not None:
            return known
        unit = Unit.of(kernel, dtype, order)
        with self._lock:
            if unit not in self._loaded:
                # In another precision the network needs more than this one: all at once is faster.
                rest = Unit.of_network(dtype, *self._degrees) if self._degrees else []
                if (reason := self.load(dict.fromkeys([unit, *rest]))) is not None:
                    raise RuntimeError(reason)
            pointer = getattr(self._loaded[unit], kernel)
            pointer.restype = None
            self._functions[kernel, dtype, order] = pointer
        return pointer

    def load(self, units: Iterable[Unit]) -> str | None:
        """Load libraries, compiling those that are missing; returns the reason if that is impossible."""
        compiler = Compiler.find()
        if compiler is None:
            return NO_COMPILER
        try:
            with self._lock:
                folder = cache_folder()
                paths = {
                    unit: folder / f"kernels-{unit.name}-{compiler.digest(unit)}.so"
                    for unit in units
                    if unit not in self._loaded
                }
                missing = {unit: path for unit, path in paths.items() if not self._open(unit, path)}
                if missing:
                    self._build(compiler, folder, missing)
                for unit, path in missing.items():
                    self._loaded[unit] = ctypes.CDLL(str(path))
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
            return f"{compiler.name} could not compile the CPU kernels: {lines[-1]}"
        except OSError as error:
            return f"the CPU kernels could not be compiled or loaded: {error}"
        return None

    def _open(self, unit: Unit, path: Path) -> bool:
        """Load a library that is in the cache; returns False without one."""
        if not path.exists():
            return False
        try:
            self._loaded[unit] = ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("%s is damaged (%s): compiling it again", path, error)
            path.unlink(missing_ok=True)
            return False
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(path)  # loaded: `remove_unused` keeps it
        return True

    @staticmethod
    def _build(compiler: Compiler, folder: Path, missing: dict[Unit, Path]) -> None:
        """Compile libraries at the same time, one process after the other, and say so."""
        with _one_process(folder):
            todo = {unit: path for unit, path in missing.items() if not path.exists()}
            if not todo:
                return
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            seconds = _SECONDS_EACH * -(-len(todo) // cores)
            print(
                f"equiformer2: compiling CPU kernels with {compiler.name} ({len(todo)} of their libraries, "
                f"about {seconds:.0f} s, once per machine; kept in {folder})",
                file=sys.stderr,
                flush=True,
            )
            quiet = not sys.stderr.isatty()
            with (
                ThreadPoolExecutor(cores) as pool,
                tqdm(total=len(todo), desc="CPU kernels", unit="file", leave=False, disable=quiet) as bar,
            ):
                jobs = [pool.submit(compiler.compile, unit, path) for unit, path in todo.items()]
                try:
                    for job in as_completed(jobs):
                        job.result()
                        bar.update()
                except BaseException:  # Ctrl-C, too: the compilers that run get it from the terminal
                    pool.shutdown(cancel_futures=True)
                    raise
            remove_unused(folder)


#: The libraries of this process.
LIBRARIES = KernelLibraries()


@contextlib.contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Context that one process enters at a time, where the file system has locks; the libraries need none."""
    lock = FileLock(folder / "kernels.lock", fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(
                "equiformer2: waiting for another process that compiles CPU kernels",
                file=sys.stderr,
                flush=True,
            )
            lock.acquire(timeout=_LONGEST_BUILD)
    except (Timeout, OSError, NotImplementedError) as error:
        # No locks on this file system, or a build that hangs: another build costs time and breaks nothing.
        logger.info("compiling without a lock: %s", error)
    try:
        yield
    finally:
        lock.release()


def cache_folder() -> Path:
    """The folder for compiled libraries, which only this user can write to, since what lies there is run.

    It is `equiformer2` in the user's cache (XDG_CACHE_HOME or ~/.cache), else one of the user in the
    temporary folder, else a new one, which goes with this process.
    """
    candidates = []
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):
        candidates.append(Path(cache) / "equiformer2")
    else:
        with contextlib.suppress(RuntimeError):  # neither HOME nor an entry among the users
            candidates.append(Path.home() / ".cache" / "equiformer2")
    user = os.getuid() if hasattr(os, "getuid") else None
    if user is not None:
        shared = Path(tempfile.gettempdir()) / f"equiformer2-{user}"
        # Where everybody can write, a link may lead anywhere.
        candidates += [] if shared.is_symlink() else [shared]
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
            own = user is None or status.st_uid == user
            if own and not status.st_mode & 0o022 and os.access(folder, os.W_OK | os.X_OK):
                return folder
    folder = Path(tempfile.mkdtemp(prefix="equiformer2-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def remove_unused(folder: Path) -> None:
    """Delete libraries that nothing has loaded for `DAYS_KEPT`; a process that has one open keeps it."""
    now = time.time()
    for pattern, days in (("kernels-*.so", DAYS_KEPT), ("*.so.part", _DAYS_UNFINISHED)):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > days * 86400:
                    path.unlink()

"""The compiled library of `kernels.cpp`, made on first use and kept in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = ("kernels.cpp", "common.h")
# The machine's own instructions: the library is made where it runs, and its name says for which processor.
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
#: What the operands of the GEMMs may be.
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
#: Highest degree that the kernels are made for (`max_degree` in common.h).
LMAX = 8


def compiler() -> str | None:
    """Path of the C++ compiler: that of the environment variable CXX, else g++ or clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def why_not(device: torch.device, dtype: torch.dtype, lmax: int) -> str | None:
    """Why the kernels cannot be used, as half a sentence, or None if they can."""
    if device.type != "cpu":
        return f"its kernels run on a CPU, not on {device.type}"
    if dtype not in DTYPES:
        return f"its kernels take {', '.join(DTYPES.values())}, not {str(dtype).removeprefix('torch.')}"
    if lmax > LMAX:
        return f"its kernels go up to lmax = {LMAX}, not {lmax}"
    return why_missing()


def why_missing() -> str | None:
    """Why there is no library, as half a sentence, or None if there is one."""
    found = _library()
    return found if isinstance(found, str) else None


def function(name: str, dtype: torch.dtype) -> "ctypes._NamedFuncPointer":
    """Kernel `name` for GEMM operands of `dtype`."""
    library = _library()
    assert isinstance(library, ctypes.CDLL), library
    found: ctypes._NamedFuncPointer = getattr(library, f"{name}_{DTYPES[dtype]}")
    found.restype = None
    return found


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none. Compiled once per source, compiler and processor."""
    path = compiler()
    if path is None:
        return "no C++ compiler was found (install g++ or clang++, or set CXX)"
    try:
        openmp = _openmp()
        folder = _cache_folder()
        target = folder / f"kernels-{_key(path, openmp)}.so"
        if not target.exists():
            logger.info("compiling the CPU kernels with %s (once per machine, some seconds)", path)
            _compile(path, openmp, target)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
        return f"{path} could not compile the CPU kernels: {lines[-1]}"
    except OSError as error:
        return f"the CPU kernels could not be compiled or loaded: {error}"


def _compile(path: str, openmp: Path | None, target: Path) -> None:
    here = Path(__file__).parent
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so.part")
    os.close(handle)
    # torch's own OpenMP: a second one would run a second set of threads against the first.
    threads = ["-fopenmp", *([str(openmp)] if openmp else [])]
    try:
        subprocess.run(
            [path, *FLAGS, str(here / SOURCES[0]), *threads, "-o", name],
            check=True,
            capture_output=True,
            text=True,
        )
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _openmp() -> Path | None:
    """The OpenMP library that torch has loaded, where it brings its own."""
    lib = Path(torch.__file__).parent / "lib"
    folders = (lib, lib.parent.parent / "torch.libs")
    return next((p for folder in folders for p in sorted(folder.glob("lib*omp*.so*"))), None)


def _key(path: str, openmp: Path | None) -> str:
    version = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
    parts = [version, *FLAGS, str(openmp), _processor()]
    parts += [(Path(__file__).parent / name).read_text() for name in SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    """What the processor can do: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"


def _cache_folder() -> Path:
    """A folder that only this user can write to: what lies there is loaded as code."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "equiformer2"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if own and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="equiformer2-"))

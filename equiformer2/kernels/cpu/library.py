"""The compiled library of `kernels.cpp`, made on first use and kept in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from equiformer2.kernels.cpu.cache import cache_folder, mark_used, remove_unused

logger = logging.getLogger(__name__)

SOURCES = ("kernels.cpp", "common.h", "sphere.h")
# The machine's own instructions: the library is made where it runs, and its name says for which processor.
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
#: What the operands of the GEMMs may be.
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
#: Highest degree that the kernels are made for (`max_degree` in common.h).
LMAX = 8

NO_COMPILER = "no C++ compiler was found (install g++ or clang++, or set CXX)"


def compiler() -> list[str] | None:
    """The C++ compiler and its first arguments: what the variable CXX says, else g++ or clang++."""
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # a quotation mark too many
        return None
    for name, *arguments in [given] if given else [["g++"], ["clang++"]]:
        if path := shutil.which(name):
            return [path, *arguments]
    return None


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
    """The library, or why there is none, which a warning says once: without it a CPU is slower."""
    found = _made_or_found()
    if isinstance(found, str):
        warnings.warn(
            f"the C++ kernels cannot be used, so that the backend 'auto' is the slower 'torch': {found}",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _made_or_found() -> ctypes.CDLL | str:
    """Compiled once per source, compiler and processor."""
    command = compiler()
    if command is None:
        return NO_COMPILER
    name = shlex.join(command)
    try:
        openmp = _openmp()
        target = cache_folder() / f"kernels-{_key(command, openmp)}.so"
        if target.exists():
            try:
                library = ctypes.CDLL(str(target))
                mark_used(target)
                return library
            except OSError as error:
                logger.warning("%s is damaged (%s): compiling it again", target, error)
        logger.info("compiling the CPU kernels with %s (once per machine, some seconds)", name)
        _compile(command, openmp, target)
        remove_unused(target.parent)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
        return f"{name} could not compile the CPU kernels: {lines[-1]}"
    except OSError as error:
        return f"the CPU kernels could not be compiled or loaded: {error}"


def _compile(command: list[str], openmp: Path | None, target: Path) -> None:
    """Write `target`, whole or not at all; several processes may do so at once."""
    here = Path(__file__).parent
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so.part")
    os.close(handle)
    # torch's own OpenMP: a second one would run a second set of threads against the first.
    threads = ["-fopenmp", *([str(openmp)] if openmp else [])]
    try:
        subprocess.run(
            [*command, *FLAGS, str(here / SOURCES[0]), *threads, "-o", name],
            check=True,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _openmp() -> Path | None:
    """The OpenMP library that torch has loaded, where it brings its own."""
    lib = Path(torch.__file__).parent / "lib"
    folders = (lib, lib.parent.parent / "torch.libs")
    return next((p for folder in folders for p in sorted(folder.glob("lib*omp*.so*"))), None)


def _key(command: list[str], openmp: Path | None) -> str:
    asked = [*command, "--version"]
    version = subprocess.run(
        asked, check=True, capture_output=True, encoding="utf-8", errors="replace"
    ).stdout
    parts = [*command, version, *FLAGS, str(openmp), _processor()]
    parts += [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    """What the processor can do: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"

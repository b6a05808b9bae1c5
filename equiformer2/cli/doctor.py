"""Command `doctor`: check of an installation."""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

from equiformer2.cli.command import Command, Parser, Result

#: Distribution -> module that is imported.
PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "e3nn": "e3nn",
    "torch-geometric": "torch_geometric",
    "pytorch-lightning": "pytorch_lightning",
    "ase": "ase",
    "lmdb": "lmdb",
    "vesin": "vesin",
    "wandb": "wandb",
}
#: Structure and answers of the self-test, made in float64 by the backend `torch`.
ANSWERS = Path(__file__).with_name("self_test.json")
#: Largest difference from them (eV, eV/Å): rounding in float32 gives 2e-6, a wrong kernel more than 0.01.
TOLERANCE = 1e-3


class Check(NamedTuple):
    """Outcome of one check.

    Attributes:
        name: subject of the check.
        ok: False where something installed is broken.
        detail: finding.
        remedy: action for the user, or an empty text.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


class Doctor(Command):
    """Check this installation and print a remedy for each problem.

    Imports the packages, lists devices and instruction sets, compiles the CPU kernels of the paper's
    networks ahead of their first use, and compares energies and forces of a small network with stored ones.
    A missing GPU, compiler or extra is no fault. Exit status 3 where something installed is broken.
    """

    def add_arguments(self, parser: Parser) -> None:
        """Add nothing: there are no options of its own."""

    def run(self, options: argparse.Namespace) -> Result:
        """Run all checks; each one goes on where another fails."""
        record: dict[str, Any] = {"versions": {"python": platform.python_version()}}
        checks = []
        for name, check in (
            ("packages", _check_packages),
            ("devices", _check_devices),
            ("cache folder", _check_cache),
            ("kernels", _check_kernels),
            ("self-test", _check_self_test),
        ):
            try:
                checks += check(record)
            except Exception as error:
                if options.debug:
                    raise
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                checks.append(Check(name, False, text, "Install equiformer2 and what it needs again."))
        ok = all(check.ok for check in checks)
        record = {"ok": ok, "checks": [check._asdict() for check in checks], **record}
        for key, empty in (
            ("cpu", {"avx512_bf16": False, "amx": False}),
            ("kernels", []),
            ("self_test", None),
        ):
            record.setdefault(key, empty)
        _print(record)
        return Result(record, status=0 if ok else 3)


def _check_packages(record: dict[str, Any]) -> list[Check]:
    """Import the packages and collect their versions."""
    checks, versions = [], record["versions"]
    for name, module in PACKAGES.items():
        versions[name] = None
        try:
            import_module(module)
            versions[name] = metadata.version(name)
        except Exception as error:  # a package may fail with anything while it is imported
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            checks.append(Check(name, False, f"cannot be imported ({text})", f"Run `pip install {name}`."))
    from equiformer2.version import __version__

    versions["equiformer2"] = __version__
    return checks or [Check("packages", True, f"{len(PACKAGES)} packages can be imported")]


def _check_devices(record: dict[str, Any]) -> list[Check]:
    """List processors, memory and GPUs."""
    import torch

    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    lines = dict(line.partition(":")[::2] for line in text.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    record["cpu"] = {
        "model": facts.get("model name", platform.processor() or platform.machine()),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_GiB": round(memory / 2**30, 1),
        "avx2": "avx2" in flags,
        "avx512": "avx512f" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "amx": "amx_tile" in flags,
    }
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    record["devices"] = {"cuda_of_torch": torch.version.cuda, "cuda": gpus}
    if gpus:
        return [Check("GPU", True, ", ".join(gpus))]
    if torch.version.cuda is None:
        detail, remedy = "this torch is built for CPUs", "For a GPU, install a CUDA build (pytorch.org)."
    else:
        detail, remedy = "torch sees no CUDA device", "For a GPU, see that `nvidia-smi` lists it."
    return [Check("GPU", True, detail, remedy)]


def _check_cache(record: dict[str, Any]) -> list[Check]:
    """Write to the folder that keeps compiled kernels."""
    import tempfile

    from equiformer2.kernels.cpu.library import cache_folder

    folder = cache_folder()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"written by equiformer2 doctor")
    record["cache_folder"] = str(folder)
    remedy = ""
    if folder.parent == Path(tempfile.gettempdir()):
        remedy = (
            "Set XDG_CACHE_HOME to a folder that only you can write to, so that kernels outlast a restart."
        )
    return [Check("cache folder", True, f"{folder} can be written to", remedy)]


def _check_kernels(record: dict[str, Any]) -> list[Check]:
    """Compile the C++ kernels of the paper's networks, and ask every backend whether it is available."""
    import torch

    from equiformer2.kernels.backend import BACKENDS, CPP
    from equiformer2.kernels.cpu.library import NO_COMPILER, Compiler, KernelLibraries, Unit

    degrees = [(3, 2), (4, 2), (6, 2), (6, 3)]  # oc20_small, 31M, 83M, 153M
    dtypes = (torch.float32, torch.bfloat16)
    units = [unit for dtype in dtypes for each in degrees for unit in Unit.of_network(dtype, *each)]
    started = time.monotonic()
    failure = KernelLibraries().load(dict.fromkeys(units))
    seconds = time.monotonic() - started
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record["kernels"] = []
    for name, backend in BACKENDS.items():
        reason = failure if backend is CPP else backend.unavailable_reason(device, torch.float32, 6, 2)
        record["kernels"].append({"name": name, "available": reason is None, "reason": reason})
    compiler = Compiler.find()
    if failure is None and compiler is not None:
        return [Check("CPU kernels", True, f"ready after {seconds:.1f} s ({compiler.version})")]
    if failure == NO_COMPILER:
        remedy = "Install g++ or clang++: networks on a CPU run faster with these kernels."
        return [Check("CPU kernels", True, NO_COMPILER, remedy)]
    remedy = (
        "Name another compiler with CXX (`CXX=clang++ equiformer2 doctor`); the backend torch runs meanwhile."
    )
    return [Check("CPU kernels", False, str(failure), remedy)]


def _check_self_test(record: dict[str, Any]) -> list[Check]:
    """Compare energies and forces of the shipped network with the stored ones, for every backend of a CPU."""
    stored = json.loads(ANSWERS.read_text(encoding="utf-8"))
    backends = ["torch"] + [
        k["name"] for k in record.get("kernels", []) if k["name"] == "cpp" and k["available"]
    ]
    started = time.monotonic()
    energy, force = 0.0, 0.0
    for backend in backends:
        energy_difference, force_difference = differences(stored, backend)
        energy, force = max(energy, energy_difference), max(force, force_difference)
    record["self_test"] = {
        "checkpoint": stored["checkpoint"],
        "backends": backends,
        "max_force_difference_eV_A": force,
        "energy_difference_eV": energy,
        "tolerance": TOLERANCE,
        "seconds": round(time.monotonic() - started, 3),
    }
    detail = f"forces differ by {force:.1e} eV/Å, energies by {energy:.1e} eV from the stored ones"
    remedy = "Remove the cache folder and run again; if that does not help, report it with `doctor --json`."
    ok = max(energy, force) <= TOLERANCE  # False for NaN
    return [Check("self-test", ok, detail, "" if ok else remedy)]


def differences(stored: dict[str, Any], backend: str) -> tuple[float, float]:
    """Largest differences of energy (eV) and forces (eV/Å) from stored answers.

    Args:
        stored: content of `ANSWERS`.
        backend: implementation of the network, on a CPU in float32.
    """
    import numpy as np
    from ase import Atoms

    from equiformer2.inference import Predictor

    atoms = Atoms(**{key: np.array(value) for key, value in stored["structure"].items()})
    # Not the calculator, whose warnings about unfamiliar structures are not about this machine.
    out = Predictor(stored["checkpoint"], device="cpu", backend=backend).predict(atoms)
    energy = abs(float(out["energy"]) - stored["energy_eV"])
    return energy, float(np.abs(out["forces"].numpy() - np.array(stored["forces_eV_A"])).max())


def _print(record: dict[str, Any]) -> None:
    """Print the record as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def table(title: str, rows: Iterable[tuple[str, ...]]) -> None:
        grid = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        for row in rows:
            grid.add_row(*row, style="red" if "broken" in row else "")
        console.print(grid)
        console.print()

    table("Versions", ((name, version or "missing") for name, version in record["versions"].items()))
    words = {
        key: ("no", "yes")[fact] if isinstance(fact, bool) else str(fact)
        for key, fact in record["cpu"].items()
    }
    table("Processor", words.items())
    marks = {True: "available", False: "-"}
    table("Backends", ((k["name"], marks[k["available"]], k["reason"] or "") for k in record["kernels"]))
    marks = {True: "ok", False: "broken"}
    texts = (". ".join(filter(None, (check["detail"], check["remedy"]))) for check in record["checks"])
    names = ((check["name"], marks[check["ok"]]) for check in record["checks"])
    table("Checks", ((*name, text) for name, text in zip(names, texts, strict=True)))
    console.print("Nothing is broken." if record["ok"] else "Something is broken: see the remedies above.")

"""The machine: its description, its memory and clock, and the precisions that are compared."""

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PRECISIONS = ("float32", "tf32", "bf16")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, system, and how busy the machine was at this moment."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")
        ]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(machine_memory() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_before": os.getloadavg()[0],
    }


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """`float32`; `tf32`: matrix products of float32 tensors on a GPU's tensor cores; `bf16`: autocast.

    The tensors that go in and come out are float32 in all three.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def now(device: str) -> float:
    """Seconds, after everything that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> int:
    """Bytes: the largest resident size of this process so far; on a GPU the most that its tensors took."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss starts at the parent's peak; VmHWM is this program's own.
        line = next(
            line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
        )
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def limit_memory(size: int) -> None:
    """Make allocations beyond `size` bytes fail, in place of the whole machine."""
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))

"""What the report says of the machine."""

import os
import platform
from pathlib import Path
from typing import Any

from benchmarks.benchmark_context import machine_memory


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

"""Compile, for a GPU that need not be there, every kernel that a call would launch.

The operations run on CPU tensors with a launcher that compiles (Triton's compiler and NVIDIA's assembler)
instead of launching, so what is compiled is what a GPU would run: same tile sizes, same constants. Used by
`test_gpu_compilation.py` in a process of its own, because Triton is either interpreting or compiling.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from equiformer2.kernels.gpu import launch as launching

RESOURCES = re.compile(r"(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)


class Target:
    """The driver interface that Triton's compiler calls."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record(arch: int) -> list[dict[str, Any]]:
    """Let every launch from now on compile for `arch`; returns the list that the reports are added to."""
    driver.set_active(Target(arch))
    reports: list[dict[str, Any]] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        spills, registers = resources(compiled.asm["ptx"], arch)
        reports.append(
            {
                "kernel": kernel.__name__,
                "registers": registers,
                "spilled_bytes": spills,
                "shared_bytes": compiled.metadata.shared,
                "instructions": sorted(set(re.findall(r"wgmma|mma\.sync|dmma", compiled.asm["ptx"]))),
            }
        )

    launching.run_kernel = compile_only
    return reports


def resources(ptx: str, arch: int) -> tuple[int, int]:
    """Spilled bytes and registers per thread, as the assembler reports them."""
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = RESOURCES.search(output)
    assert found is not None, output
    return int(found[1]), int(found[2])


def main() -> None:
    import gpu_calls

    arch, dtype, lmax, mmax, channels = sys.argv[1:]
    reports = record(int(arch))
    found = gpu_calls.calls(
        torch.device("cpu"), getattr(torch, dtype), lmax=int(lmax), mmax=int(mmax), channels=int(channels)
    )
    for call in found.values():
        gpu_calls.gradients_of(call)
    print(json.dumps(reports))


if __name__ == "__main__":
    main()

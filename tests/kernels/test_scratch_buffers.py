"""Memory that chunked loops use again."""

import platform
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from equiformer2.kernels.scratch_buffers import MOST_BYTES, scratch


def addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def test_memory_is_used_again_for_one_purpose() -> None:
    first, second = scratch("a", 7, [3, 5], torch.float32)
    assert (first.shape, second.shape) == ((7, 3), (7, 5))
    assert first.is_contiguous()
    assert second.is_contiguous()
    first.fill_(1.0)
    second.fill_(2.0)
    assert (first == 1.0).all()
    assert addresses(scratch("a", 4, [6], torch.bfloat16)) == addresses([first])
    assert addresses(scratch("b", 7, [3], torch.float32)) != addresses([first])
    larger = scratch("a", 100, [30], torch.float64)
    assert addresses(scratch("a", 7, [3], torch.float32)) == addresses(larger)


def test_no_rows() -> None:
    assert [t.shape for t in scratch("none", 0, [3, 5], torch.float32)] == [(0, 3), (0, 5)]


def test_what_is_too_large_is_not_kept() -> None:
    kept, large = scratch("c", 5, [5], torch.float32), scratch("c", 1, [MOST_BYTES + 1], torch.int8)
    assert addresses(kept) != addresses(large)
    assert addresses(scratch("c", 5, [5], torch.float32)) == addresses(kept)


def test_every_thread_has_its_own() -> None:
    found: list[list[Tensor]] = []

    def ask() -> None:
        found.append(scratch("d", 5, [5], torch.float32))

    ask()
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tensors[0].data_ptr() for tensors in found}) == 3


def test_after_inference_mode_it_can_be_used_in_training() -> None:
    with torch.inference_mode():
        scratch("e", 5, [5], torch.float32)
    (again,) = scratch("e", 5, [5], torch.float32)
    assert (again.fill_(2.0) * torch.ones(5, requires_grad=True)).requires_grad


FAULTS = """
import resource, sys, torch
from equiformer2.kernels.scratch_buffers import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()
def work():
    blocks = [torch.empty(2**23, dtype=torch.uint8).fill_(1) for _ in range(3)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
before = faults()
for _ in range(10):
    work()
print(faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the allocator of glibc")
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)

    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", FAULTS, *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    kept = faults("keep")
    # Without it glibc gives the 24 MiB back that are freed at a time and maps their pages again, unless
    # some small block happens to lie above them; with a low threshold it always does. A small block
    # that came to lie in a hole costs the kept memory a few pages as well.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert 5 * kept < faults()

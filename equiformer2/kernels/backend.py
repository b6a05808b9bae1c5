"""Which implementation of the hot operations runs.

- `auto`, the default: `cpp` on a CPU where it can be had, else `torch`.
- `torch`: oneDNN, BLAS or cuBLAS and chunked loops that store little; any device and precision.
- `cpp`: the same with the C++ kernels of `kernels.cpu` between the GEMMs; CPUs, with a C++ compiler at hand.
- `compile`: plain expressions, for `torch.compile` to fuse; the network is compiled as a whole.
- `triton`: the kernels of `kernels.gpu` between cuBLAS GEMMs; NVIDIA GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from equiformer2.kernels import gpu
from equiformer2.kernels.cpu import library

BACKENDS = ("auto", "torch", "cpp", "compile", "triton")
PARAMETER_DTYPES = (torch.float32, torch.float64)


class Neighbors(NamedTuple):
    """Both directions of the edges, for sums without atomic additions.

    Attributes:
        source_order: `[E]` edges in the order of their sources.
        source_starts: `[N + 1]` first edge of every source in that order.
        target_starts: `[N + 1]` first edge of every target.
    """

    source_order: Tensor
    source_starts: Tensor
    target_starts: Tensor

    @classmethod
    def of(cls, edge_index: Tensor, num_atoms: int) -> "Neighbors":
        """From `edge_index [2, E]`, sorted by target."""
        source_order, source_starts = gpu.csr(edge_index[0], num_atoms)
        return cls(source_order, source_starts, gpu.segment_starts(edge_index[1], num_atoms))


_triton: ContextVar[Neighbors | None] = ContextVar("neighbors", default=None)


@contextmanager
def triton_kernels(neighbors: Neighbors) -> Iterator[None]:
    """Context in which the operations run in Triton; `neighbors` of the edges that they work on."""
    token = _triton.set(neighbors)
    try:
        yield
    finally:
        _triton.reset(token)


def triton_neighbors() -> Neighbors | None:
    """Those of the surrounding `triton_kernels`, or None where the operations run in torch."""
    return None if torch.compiler.is_compiling() else _triton.get()


_cpp: ContextVar[bool] = ContextVar("cpp", default=False)


@contextmanager
def use_cpp_kernels(use: bool = True) -> Iterator[None]:
    """Context in which the operations run in the C++ kernels of `kernels.cpu`, or do not."""
    token = _cpp.set(use)
    try:
        yield
    finally:
        _cpp.reset(token)


def cpp_kernels(dtype: torch.dtype) -> bool:
    """Whether a surrounding `use_cpp_kernels` asks for them, and they can take GEMM operands of `dtype`."""
    return not torch.compiler.is_compiling() and _cpp.get() and dtype in library.DTYPES


def plain_expressions(differentiated_frames: bool) -> bool:
    """Whether operations are to be plain expressions, which every transformation can go through."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and differentiated_frames)


def why_not(
    backend: str, device: torch.device, dtype: torch.dtype, lmax: int, mmax: int, frames_need_grad: bool
) -> str | None:
    """Why `backend` cannot be used, as half a sentence, or None if it can.

    Args:
        backend: one of `BACKENDS`.
        device, dtype: of the parameters.
        lmax, mmax: L and M.
        frames_need_grad: gradients flow to positions through the edge frames.
    """
    if backend not in BACKENDS:
        return f"known are {', '.join(BACKENDS)}"
    if dtype not in PARAMETER_DTYPES:
        # Distances would be off by hundredths of an Å, and the steps of an optimizer lost in rounding.
        return (
            f"the parameters are {str(dtype).removeprefix('torch.')}, and geometry, norms and sums need "
            "float32 or float64: keep them so and round the matrix products alone, with torch.autocast"
        )
    if backend == "cpp":
        return library.LIBRARIES.unavailable_reason(device, dtype, lmax, mmax)
    if backend == "compile":
        return _why_not_compiled(device)
    if backend == "triton":
        return gpu.supports(device, dtype, lmax, mmax, frames_need_grad, second_derivatives=False)
    return None


def _why_not_compiled(device: torch.device) -> str | None:
    """Inductor writes C++ for a CPU and Triton for a GPU."""
    if device.type == "cpu" and library.Compiler.find() is None:
        return library.NO_COMPILER
    if device.type == "cuda" and find_spec("triton") is None:
        return "Triton is not installed"
    return None

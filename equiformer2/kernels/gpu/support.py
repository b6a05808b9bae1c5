"""Preparations that need no Triton: limits of the kernels, and edges grouped by atom."""

import importlib.util
import os

import torch
from torch import Tensor

MAX_DEGREE = 8

# Asynchronous copies, TF32 and bfloat16 tensor cores came with compute capability 8. The tiles of the
# products on the sphere need more shared memory than workstation GPUs have.
_LEAST_CAPABILITY = 8
_LEAST_SHARED_BYTES = 160 * 1024


def supports(
    device: torch.device,
    dtype: torch.dtype,
    lmax: int,
    mmax: int,
    frames_need_grad: bool,
) -> str | None:
    """Reason why the Triton kernels cannot be used, as half a sentence; None if they can.

    Args:
        device: of the model.
        dtype: of the features: float32 or bfloat16; float64 is slow, for tests.
        lmax, mmax: L and M.
        frames_need_grad: gradients flow to positions through the edge frames (forces as the gradient of the
            energy).
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "they were written for NVIDIA GPUs alone"
        properties = torch.cuda.get_device_properties(device)
        # torch's type stubs lack this one.
        shared: int = getattr(properties, "shared_memory_per_block_optin", 0)
        if properties.major < _LEAST_CAPABILITY or shared < _LEAST_SHARED_BYTES:
            return f"they need an A100, H100 or newer GPU for data centres, not {properties.name}"
    elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"they need a CUDA device, not {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"they work in float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not 1 <= lmax <= MAX_DEGREE or not 0 <= mmax <= lmax:
        return f"they need 1 <= lmax <= {MAX_DEGREE} and mmax <= lmax, not lmax {lmax} and mmax {mmax}"
    if frames_need_grad:
        return "they have no gradient with respect to the edge frames (forces as the gradient of the energy)"
    return None


def segment_starts(index: Tensor, num: int) -> Tensor:
    """Find the first edge of each atom, without waiting for the device.

    Args:
        index: `[E]` atom of each edge, sorted.
        num: N.

    Returns:
        `[N + 1]`, with E at the end.
    """
    return torch.searchsorted(index, torch.arange(num + 1, device=index.device, dtype=index.dtype))


def csr(index: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Group edges by atom, once per batch.

    Args:
        index: `[E]` atom of each edge, in any order.
        num: N.

    Returns:
        `order [E]`, a stable permutation that sorts the edges by atom, and `starts [N + 1]`: the edges of
        atom n are `order[starts[n]:starts[n + 1]]`, in their original sequence.
    """
    ordered, order = torch.sort(index, stable=True)
    return order, segment_starts(ordered, num)

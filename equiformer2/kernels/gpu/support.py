"""Whether the Triton kernels can do what a model asks of them, answered before its first step."""

import importlib.util
import os

import torch

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
    second_derivatives: bool,
) -> str | None:
    """Why the Triton kernels cannot be used, as half a sentence, or None if they can.

    Args:
        device: of the model.
        dtype: of the features: float32 or bfloat16; float64 is slow, for tests.
        lmax, mmax: L and M.
        frames_need_grad: gradients flow to positions through the edge frames (forces as the gradient of the
            energy).
        second_derivatives: a loss contains gradients (training on such forces).
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
    if second_derivatives:
        return "they have no second derivatives"
    return None

"""Matrix products through the fastest library at hand."""

import platform

import torch
from torch import Tensor

# What torch.compile emits for a linear layer on a CPU: oneDNN, up to a quarter faster in float32 than the
# BLAS behind torch.mm where we measured it (an AMD EPYC).
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Without AVX-512 (or AVX-NE-CONVERT) oneDNN refuses bfloat16, which torch then multiplies by itself.
_TAKES_BFLOAT16 = _HAS_ONEDNN and bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if _TAKES_BFLOAT16 else (torch.float32,)
_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
_CAN_PACK = _HAS_ONEDNN and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply `x @ weight^T`, differentiable any number of times unless `weight` is packed.

    Args:
        x: `[n, in]`.
        weight: `[out, in]` in the data type of `x`, or what `pack` made of it.

    Returns:
        `[n, out]`.
    """
    if weight.is_mkldnn:
        return _OneDnnLinear.multiply(x.contiguous(), weight) if len(x) else x.new_empty(0, len(weight))
    if _OneDnnLinear.takes(x, weight):
        if not torch.is_grad_enabled():
            return _OneDnnLinear.multiply(x, weight)
        return _OneDnnLinear.apply(x, weight)
    return torch.nn.functional.linear(x, weight)


def pack(weight: Tensor) -> Tensor:
    """Reorder `weight [out, in]` into the layout in which oneDNN multiplies, for `linear` without gradients.

    The result has shape and dtype, but nothing except `linear` can read it. Without oneDNN it is `weight`.
    """
    if not (_CAN_PACK and weight.device.type == "cpu" and weight.dtype in _ONEDNN_DTYPES and weight.numel()):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for products of bfloat16 numbers.

    Without them such products are slower than those of float32 numbers.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not _TAKES_BFLOAT16:
        return False
    # oneDNN takes them on all processors with AVX-512, and computes in float32 on many of these.
    return not _X86 or any(
        getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


class _OneDnnLinear(torch.autograd.Function):
    """Matrix product by oneDNN."""

    @staticmethod
    def takes(x: Tensor, weight: Tensor) -> bool:
        """Say whether oneDNN multiplies these, and faster than BLAS."""
        return (
            x.device.type == "cpu"
            and x.dtype == weight.dtype
            and x.dtype in _ONEDNN_DTYPES
            # oneDNN has no fast kernel for transposed inputs that are slices of something larger.
            and x.stride(1) == 1
            and x.numel() > 0
            and weight.numel() > 0
            and _HAS_ONEDNN
            and not torch.compiler.is_compiling()
        )

    @staticmethod
    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        """Multiply without a derivative."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return out

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _OneDnnLinear.multiply(x, weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight

"""Softmax over the incoming edges of each atom. One program holds one atom and all its heads."""

from typing import Any

import torch
from torch import Tensor

from equiformer2.kernels.gpu.device_functions import add, maximum
from equiformer2.kernels.gpu.launch import TRITON_DTYPES, accumulator, launch, power_of_two, tl, triton

# Edges that a program looks at together: the usual limit of neighbours is 20.
_EDGES = 32


def segment_softmax(logits: Tensor, target_ptr: Tensor) -> Tensor:
    """Softmax of attention logits over the incoming edges of each target atom.

    Args:
        logits: `[E, H]`, edges sorted by target.
        target_ptr: `[N + 1]` first edge of each target, from `segment_starts(target, N)`.

    Returns:
        `[E, H]` float32 (float64 for float64 logits); those of one target and head sum to one.
    """
    return _SegmentSoftmax.forward(logits.contiguous(), target_ptr)


class _SegmentSoftmax:
    """The operator, and its gradient."""

    @staticmethod
    @torch.library.custom_op("equiformer2::segment_softmax", mutates_args=())
    def forward(logits: Tensor, target_ptr: Tensor) -> Tensor:
        """Compute `segment_softmax` of contiguous logits."""
        out = torch.empty_like(logits, dtype=accumulator(logits))
        _SegmentSoftmax.launch(_softmax_kernel, out, logits, logits, target_ptr)
        return out

    @staticmethod
    @torch.library.custom_op("equiformer2::segment_softmax_backward", mutates_args=())
    def gradient(grad: Tensor, weights: Tensor, target_ptr: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the gradient of the logits, in their `dtype`, from that of the weights."""
        out = torch.empty_like(weights, dtype=dtype)
        _SegmentSoftmax.launch(_softmax_backward_kernel, out, grad, weights, target_ptr)
        return out

    @staticmethod
    def launch(kernel: Any, out: Tensor, first: Tensor, second: Tensor, target_ptr: Tensor) -> None:
        """Run a kernel for every target atom."""
        heads = out.shape[1]
        launch(
            kernel,
            (len(target_ptr) - 1,),
            first,
            second,
            target_ptr,
            out,
            HEADS=heads,
            BLOCK_HEADS=power_of_two(heads, 1),
            BLOCK_EDGES=_EDGES,
            ACC=TRITON_DTYPES[accumulator(out)],
            num_warps=1,
        )

    @classmethod
    def register(cls) -> None:
        """Tell compilers the shapes of the outputs, and autograd the derivative."""
        cls.forward.register_fake(
            lambda logits, target_ptr: torch.empty_like(logits, dtype=accumulator(logits))
        )
        cls.gradient.register_fake(
            lambda grad, weights, target_ptr, dtype: torch.empty_like(weights, dtype=dtype)
        )

        def setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
            ctx.dtype = inputs[0].dtype
            ctx.save_for_backward(output, inputs[1])

        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return cls.gradient(grad.contiguous(), *ctx.saved_tensors, ctx.dtype), None

        cls.forward.register_autograd(backward, setup_context=setup)


_SegmentSoftmax.register()


@triton.jit
def _softmax_kernel(  # type: ignore[no-untyped-def]
    logits,
    unused,
    starts,
    out,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_EDGES: tl.constexpr,
    ACC: tl.constexpr,
):
    atom = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)
    last = tl.load(starts + atom + 1)
    shift = tl.full((BLOCK_HEADS,), float("-inf"), ACC)
    total = tl.full((BLOCK_HEADS,), 0.0, ACC)
    for first in range(tl.load(starts + atom), last, BLOCK_EDGES):
        edges = first + tl.arange(0, BLOCK_EDGES)
        mask = (edges < last)[:, None] & (heads < HEADS)[None, :]
        offsets = edges[:, None] * HEADS + heads[None, :]
        # Unused heads get zeros rather than -inf, which would make NaN of their shift.
        values = tl.load(logits + offsets, mask=mask, other=0.0).to(ACC)
        values = tl.where((edges < last)[:, None], values, float("-inf"))
        larger = tl.maximum(shift, tl.reduce(values, 0, maximum))
        total = total * tl.exp(shift - larger) + tl.reduce(tl.exp(values - larger[None, :]), 0, add)
        shift = larger
    for first in range(tl.load(starts + atom), last, BLOCK_EDGES):
        edges = first + tl.arange(0, BLOCK_EDGES)
        mask = (edges < last)[:, None] & (heads < HEADS)[None, :]
        offsets = edges[:, None] * HEADS + heads[None, :]
        values = tl.load(logits + offsets, mask=mask, other=0.0).to(ACC)
        # 1e-16 as in torch_geometric.utils.softmax, which the reference uses.
        tl.store(out + offsets, tl.exp(values - shift[None, :]) / (total[None, :] + 1e-16), mask=mask)


@triton.jit
def _softmax_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    weights,
    starts,
    out,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_EDGES: tl.constexpr,
    ACC: tl.constexpr,
):
    atom = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)
    last = tl.load(starts + atom + 1)
    total = tl.full((BLOCK_HEADS,), 0.0, ACC)
    for first in range(tl.load(starts + atom), last, BLOCK_EDGES):
        edges = first + tl.arange(0, BLOCK_EDGES)
        mask = (edges < last)[:, None] & (heads < HEADS)[None, :]
        offsets = edges[:, None] * HEADS + heads[None, :]
        weight = tl.load(weights + offsets, mask=mask, other=0.0)
        total += tl.reduce(weight * tl.load(grad + offsets, mask=mask, other=0.0), 0, add)
    for first in range(tl.load(starts + atom), last, BLOCK_EDGES):
        edges = first + tl.arange(0, BLOCK_EDGES)
        mask = (edges < last)[:, None] & (heads < HEADS)[None, :]
        offsets = edges[:, None] * HEADS + heads[None, :]
        weight = tl.load(weights + offsets, mask=mask, other=0.0)
        change = tl.load(grad + offsets, mask=mask, other=0.0) - total[None, :]
        tl.store(out + offsets, weight * change, mask=mask)

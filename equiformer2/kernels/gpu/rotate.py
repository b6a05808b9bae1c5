"""First half of a message: gather both atoms, rotate into the edge frame, multiply by the radial weights.

The operator; see `rotate_kernels` for what runs on the GPU.
"""

import torch
from torch import Tensor

from equiformer2.kernels.gpu.launch import TRITON_DTYPES, accumulator, channel_tile, expect, launch
from equiformer2.kernels.gpu.rotate_kernels import gather_rotate_kernel, grad_radial_kernel, grad_x_kernel
from equiformer2.kernels.gpu.tables import num_rows, packed_size, radial_rows


def gather_rotate(
    x: Tensor,
    packed: Tensor,
    source: Tensor,
    target: Tensor,
    radial: Tensor,
    lmax: int,
    mmax: int,
    shared_orders: bool,
    source_order: Tensor,
    source_ptr: Tensor,
    target_ptr: Tensor,
) -> Tensor:
    """`radial * rotate([x_source, x_target])` cut to |m| <= mmax, ready for one GEMM per order m.

    Args:
        x: `[N, K, C]` atom features.
        packed: `[E, at least P]` Wigner-D blocks of l = 0..L one after another, each row-major with rows
            m = 0, +1, -1, … (see `kernels.rotation`). A constant: it gets no gradient.
        source, target: `[E]` atom indices, sorted by target.
        radial: `[E, Q]` radial weights of (m, l, 2C) inputs, or of (l, 2C) when `shared_orders`.
        lmax, mmax: L and M.
        source_order, source_ptr: the edges grouped by source, from `csr(source, N)`.
        target_ptr: `[N + 1]` first edge of each target, from `segment_starts(target, N)`.

    Returns:
        `[E, R * 2C]` in the data type of `radial`: m-major rows, each with the C channels of the source and
        then those of the target. Deterministic in value and gradient.
    """
    return _gather_rotate(
        x.contiguous(),
        packed.contiguous(),
        source,
        target,
        radial.contiguous(),
        lmax,
        mmax,
        shared_orders,
        source_order,
        source_ptr,
        target_ptr,
    )


@torch.library.custom_op("equiformer2::gather_rotate", mutates_args=())
def _gather_rotate(
    x: Tensor,
    packed: Tensor,
    source: Tensor,
    target: Tensor,
    radial: Tensor,
    lmax: int,
    mmax: int,
    shared_orders: bool,
    source_order: Tensor,
    source_ptr: Tensor,
    target_ptr: Tensor,
) -> Tensor:
    edges, channels = len(source), x.shape[2]
    expect(x.shape[1] == (lmax + 1) ** 2, f"gather_rotate: x has {x.shape[1]} coefficients for lmax {lmax}")
    expect(
        len(packed) == edges and packed.shape[1] >= packed_size(lmax, mmax),
        "gather_rotate: packed does not fit lmax, mmax and E",
    )
    width = radial_rows(lmax, mmax, shared_orders) * 2 * channels
    expect(radial.shape == (edges, width), f"gather_rotate: radial is not [{edges}, {width}]")
    expect(
        len(source_order) == len(target) == edges,
        "gather_rotate: source, target and source_order are not all [E]",
    )
    expect(len(source_ptr) == len(target_ptr) == len(x) + 1, "gather_rotate: the pointers are not [N + 1]")
    out = radial.new_empty(edges, num_rows(lmax, mmax) * 2 * channels)
    block, tiles = channel_tile(channels)
    launch(
        gather_rotate_kernel,
        (edges, 2 * tiles),
        x,
        packed,
        source,
        target,
        radial,
        out,
        packed.shape[1],
        LMAX=lmax,
        MMAX=mmax,
        SHARED=shared_orders,
        C=channels,
        BLOCK=block,
        TILES=tiles,
        Q=radial.shape[1],
        WIDTH=out.shape[1],
        ACC=TRITON_DTYPES[accumulator(x, radial)],
        num_warps=1,
    )
    return out


@_gather_rotate.register_fake
def _(x, packed, source, target, radial, lmax, mmax, *rest):  # type: ignore[no-untyped-def]
    return radial.new_empty(source.shape[0], num_rows(lmax, mmax) * 2 * x.shape[2])


@torch.library.custom_op("equiformer2::gather_rotate_grad_radial", mutates_args=())
def _grad_radial(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    source: Tensor,
    target: Tensor,
    radial: Tensor,
    lmax: int,
    mmax: int,
    shared_orders: bool,
) -> Tensor:
    channels = x.shape[2]
    out = torch.empty_like(radial)
    block, tiles = channel_tile(channels)
    launch(
        grad_radial_kernel,
        (len(source), 2 * tiles),
        grad,
        x,
        packed,
        source,
        target,
        out,
        packed.shape[1],
        LMAX=lmax,
        MMAX=mmax,
        SHARED=shared_orders,
        C=channels,
        BLOCK=block,
        TILES=tiles,
        Q=radial.shape[1],
        WIDTH=grad.shape[1],
        ACC=TRITON_DTYPES[accumulator(x, radial)],
        num_warps=1,
    )
    return out


@_grad_radial.register_fake
def _(grad, x, packed, source, target, radial, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(radial)


@torch.library.custom_op("equiformer2::gather_rotate_grad_x", mutates_args=())
def _grad_x(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    radial: Tensor,
    lmax: int,
    mmax: int,
    shared_orders: bool,
    source_order: Tensor,
    source_ptr: Tensor,
    target_ptr: Tensor,
) -> Tensor:
    channels = x.shape[2]
    out = torch.empty_like(x)
    block, tiles = channel_tile(channels)
    launch(
        grad_x_kernel,
        (len(x), (lmax + 1) * tiles),
        grad,
        packed,
        radial,
        source_order,
        source_ptr,
        target_ptr,
        out,
        packed.shape[1],
        LMAX=lmax,
        MMAX=mmax,
        SHARED=shared_orders,
        C=channels,
        BLOCK=block,
        TILES=tiles,
        Q=radial.shape[1],
        WIDTH=grad.shape[1],
        ACC=TRITON_DTYPES[accumulator(x, radial)],
        num_warps=1,
    )
    return out


@_grad_x.register_fake
def _(grad, x, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, packed, source, target, radial, lmax, mmax, shared_orders, *csr = inputs
    ctx.save_for_backward(x, packed, source, target, radial, *csr)
    ctx.sizes = lmax, mmax, shared_orders


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, packed, source, target, radial, *csr = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_radial = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_x(grad, x, packed, radial, *ctx.sizes, *csr)
    if ctx.needs_input_grad[4]:
        grad_radial = _grad_radial(grad, x, packed, source, target, radial, *ctx.sizes)
    return grad_x, None, None, None, grad_radial, None, None, None, None, None, None


_gather_rotate.register_autograd(_backward, setup_context=_setup)

"""Calls of the C++ kernels for edges.

Arguments that a kernel cannot take raise `ValueError`. That indices name atoms, and that targets are
sorted, is checked once per graph (`graph.checked_graph`), not in every call.
"""

import torch
from torch import Tensor

from equiformer2.kernels.cpu.ctypes_call import arithmetic, call, check, check_per_order, empty_per_order
from equiformer2.kernels.layout import OrderLayout


def gather_rotate(
    x: Tensor,
    x_target: Tensor,
    source: Tensor,
    target: Tensor,
    packed: Tensor,
    radial: Tensor,
    bias: Tensor,
    degrees: tuple[int, int],
    shared: bool,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Compute the GEMM inputs of every order: `Edges.inputs` of `kernels.convolve`.

    Args:
        x, x_target: `[N, K, C]` and `[N', K, C]` features of sources and targets.
        source, target: `[e]` atoms of the edges.
        packed: `[e, P + 1]` Wigner-D entries.
        radial: `[e, Q]` radial weights before their bias is added, in the type of the GEMMs.
        bias: `[Q]`.
        degrees: highest degree and order.
        shared: all orders of a degree share their radial weights.
        out: tensors as `ctypes_call.empty_per_order` makes them, to be written to.

    Returns:
        `out`, or new tensors.

    Raises:
        ValueError: a tensor has another type, shape or layout.
    """
    _check_inputs(x, x_target, source, target, packed, radial, bias, degrees, shared)
    if out is None:
        out = empty_per_order(radial, degrees, 2 * x.shape[2])
    check_per_order("out", out, radial.dtype, len(source), degrees, 2 * x.shape[2])
    arguments = (x, x_target, source, target, packed, packed.shape[1], radial, bias, radial.shape[1])
    call(
        "gather_rotate", radial.dtype, degrees[1], *arguments, out, len(source), x.shape[2], *degrees, shared
    )
    return out


def gather_rotate_backward(
    x: Tensor,
    x_target: Tensor,
    source: Tensor,
    target: Tensor,
    packed: Tensor,
    radial: Tensor,
    bias: Tensor,
    grads: list[Tensor],
    grad_x: Tensor,
    grad_x_target: Tensor,
    degrees: tuple[int, int],
    shared: bool,
    grad_radial: Tensor | None = None,
) -> Tensor:
    """Differentiate `gather_rotate`, whose other arguments these are.

    Args:
        grads: gradients of the GEMM inputs.
        grad_x, grad_x_target: as `x` and `x_target`; the gradients of the features are added.
        grad_radial: `[e, Q]` to be written to, if not a new tensor.

    Returns:
        The gradient of the radial weights.

    Raises:
        ValueError: a tensor has another type, shape or layout.
    """
    _check_inputs(x, x_target, source, target, packed, radial, bias, degrees, shared)
    check_per_order("grads", grads, radial.dtype, len(source), degrees, 2 * x.shape[2])
    check("grad_x", grad_x, x.dtype, *x.shape)
    check("grad_x_target", grad_x_target, x.dtype, *x_target.shape)
    if grad_radial is None:
        grad_radial = torch.empty_like(radial)
    check("grad_radial", grad_radial, radial.dtype, *radial.shape)
    arguments = (x, x_target, source, target, packed, packed.shape[1], radial, bias, radial.shape[1])
    totals = grad_x, grad_x_target, grad_radial
    sizes = len(source), x.shape[2], *degrees
    call("gather_rotate_backward", radial.dtype, degrees[1], *arguments, grads, *totals, *sizes, shared)
    return grad_radial


def rotate_sum(
    products: list[Tensor],
    bias: Tensor | None,
    alpha: Tensor | None,
    packed: Tensor,
    target: Tensor,
    out: Tensor,
    degrees: tuple[int, int],
    kept: tuple[int, int],
) -> None:
    """Add the messages of some edges to `out`: `Messages.add_to` of `kernels.aggregate`.

    Args:
        products: GEMM outputs of every order.
        bias: `[(kept l + 1) C]` of order m = 0, or None.
        alpha: `[e, H]` attention weights, or None.
        packed: `[e, P + 1]` Wigner-D entries.
        target: `[e]` sorted target atoms.
        out: `[N, (kept l + 1)^2, C]`.
        degrees: highest degree and order of `packed`.
        kept: those of the products.

    Raises:
        ValueError: a tensor has another type, shape or layout.
    """
    target, dtype = target.contiguous(), products[0].dtype
    _check_sum(alpha, packed, target, out, degrees, kept, arithmetic(dtype))
    check_per_order("products", products, dtype, len(target), kept, out.shape[2])
    if bias is not None:
        check("bias", bias, dtype, (kept[0] + 1) * out.shape[2])
    heads = 1 if alpha is None else alpha.shape[1]
    sizes = len(target), out.shape[2], *degrees, *kept
    arguments = (products, bias, alpha, heads, packed, packed.shape[1], target, out)
    call("rotate_sum", dtype, kept[1], *arguments, *sizes)


def rotate_sum_backward(
    grad: Tensor,
    values: Tensor | None,
    alpha: Tensor | None,
    packed: Tensor,
    target: Tensor,
    degrees: tuple[int, int],
    kept: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor | None]:
    """Differentiate `rotate_sum`: `SummedMessages.gradients` of `kernels.aggregate`.

    Args:
        grad: gradient of the sums, `[N, (kept l + 1)^2, C]`.
        values: `[e, R C]`, `so2.gauss_values` of the products; needed with attention weights.
        alpha, packed, target, degrees, kept: as in `rotate_sum`.
        dtype: type of the products.

    Returns:
        The gradients of the products, and that of the attention weights, if there are any.

    Raises:
        ValueError: a tensor has another type, shape or layout, or `values` are missing.
    """
    edges, channels = len(target), grad.shape[2]
    target = target.contiguous()
    _check_sum(alpha, packed, target, grad, degrees, kept, arithmetic(dtype))
    rows = OrderLayout(*kept).num_rows
    grad_alpha = None
    if alpha is not None:
        if values is None:
            raise ValueError("attention weights need values: the gradient of the weights reads them")
        check("values", values, dtype, edges, rows * channels)
        grad_alpha = torch.empty_like(alpha)
    grads = empty_per_order(grad.new_empty(edges, 0, dtype=dtype), kept, channels)
    heads = 1 if alpha is None else alpha.shape[1]
    messages = values, rows * channels, alpha, heads, packed, packed.shape[1], target
    sizes = edges, channels, *degrees, *kept
    call("rotate_sum_backward", dtype, kept[1], grad, *messages, grads, grad_alpha, *sizes)
    return grads, grad_alpha


def _check_inputs(
    x: Tensor,
    x_target: Tensor,
    source: Tensor,
    target: Tensor,
    packed: Tensor,
    radial: Tensor,
    bias: Tensor,
    degrees: tuple[int, int],
    shared: bool,
) -> None:
    lmax, mmax = degrees
    wide, edges, channels = arithmetic(radial.dtype), len(source), x.shape[-1]
    groups = OrderLayout(lmax, mmax).radial_rows(shared)
    check("x", x, wide, len(x), (lmax + 1) ** 2, channels)
    check("x_target", x_target, wide, len(x_target), (lmax + 1) ** 2, channels)
    check("source", source, torch.int64, edges)
    check("target", target, torch.int64, edges)
    check("packed", packed, wide, edges, OrderLayout(*degrees).packed_size + 1)
    check("radial", radial, radial.dtype, edges, groups * 2 * channels)
    check("bias", bias, radial.dtype, groups * 2 * channels)


def _check_sum(
    alpha: Tensor | None,
    packed: Tensor,
    target: Tensor,
    total: Tensor,
    degrees: tuple[int, int],
    kept: tuple[int, int],
    wide: torch.dtype,
) -> None:
    edges, channels = len(target), total.shape[-1]
    check("target", target, torch.int64, edges)
    check("packed", packed, wide, edges, OrderLayout(*degrees).packed_size + 1)
    check("the sum over edges", total, wide, len(total), (kept[0] + 1) ** 2, channels)
    if alpha is not None:
        check("alpha", alpha, wide, edges, alpha.shape[-1])
        if channels % alpha.shape[1]:
            raise ValueError(f"{channels} channels cannot be shared by {alpha.shape[1]} heads")

"""Feed-forward network on the sphere, without storing the grid for all atoms at once."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiformer2.kernels import gpu
from equiformer2.kernels.backend import TRITON, Backend
from equiformer2.kernels.chunks import cast_to_autocast, no_autocast, point_chunks
from equiformer2.kernels.cpu import sphere as cpu
from equiformer2.kernels.linear import linear
from equiformer2.kernels.s2_grid import (
    GridFactors,
    GridFunction,
    bytes_per_row,
    differentiated_again,
    in_arithmetic,
    plain,
)


def grid_mlp(
    x: Tensor,
    to_grid: Tensor,
    from_grid: Tensor,
    weight: Tensor,
    backend: Backend,
    factors: GridFactors | None = None,
) -> Tensor:
    """Feed-forward network on the sphere: grid points of SiLU(weight @ SiLU(x)), back to coefficients.

    The first and the last linear layer of the network act on channels only and commute with the
    transformation between coefficients and grid, so the caller applies them to the K coefficients instead of
    the G > K grid points.

    Args:
        x: `[B, K, C]`; to_grid: `[G, K]`; from_grid: `[K, G]`; weight: `[D, C]`.
        backend: the implementation.
        factors: of the grid, for the C++ kernels.

    Returns:
        `[B, K, D]`.
    """
    x, to_grid, from_grid, weight = cast_to_autocast(x, to_grid, from_grid, weight)
    with no_autocast(x):
        if backend is TRITON:
            return gpu.grid_mlp(x, to_grid, from_grid, weight)
        if backend.takes_expressions():
            return plain(x, to_grid, from_grid, weight)
        if factors is not None and backend.takes_cpp(x.dtype):
            return _SeparableMlp.apply(x.contiguous(), to_grid, from_grid, weight, factors)
        return GridFunction.apply(x, to_grid, from_grid, weight)


class _SeparableMlp(torch.autograd.Function):
    """One pass over latitudes and longitudes each way, SiLU on the way, a GEMM in between."""

    @staticmethod
    def forward(ctx, x, to_grid, from_grid, weight, factors):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, to_grid, from_grid, weight, *factors)
        factors = in_arithmetic(factors, x)
        out = x.new_empty(*x.shape[:2], len(weight))
        for part in point_chunks(len(x), bytes_per_row(x, to_grid), x.device):
            points = cpu.to_points(x[part], factors, factors.to_latitude, activate=True)
            hidden = _of_points(points, weight)
            cpu.from_points(hidden, factors, factors.from_latitude, out[part], activate=True)
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            return differentiated_again(ctx, grad_out)
        x, to_grid, _, weight, *factors = ctx.saved_tensors
        factors, grad_out = in_arithmetic(GridFactors(*factors), x), grad_out.contiguous()
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for part in point_chunks(len(x), 2 * bytes_per_row(x, to_grid), x.device):
            points = cpu.to_points(x[part], factors, factors.to_latitude)
            activated = silu(points)
            hidden = _of_points(activated, weight)
            grad = cpu.to_points(grad_out[part], factors, factors.from_latitude, inputs=hidden)
            grad_weight += grad.flatten(0, 1).t() @ activated.flatten(0, 1)
            grad = _of_points(grad, weight.t())
            cpu.from_points(grad, factors, factors.to_latitude, grad_x[part], inputs=points)
        return grad_x, None, None, grad_weight.to(weight.dtype), None


def _of_points(points: Tensor, weight: Tensor) -> Tensor:
    """`[n, G, C]` to `[n, G, D]`, contiguous."""
    return linear(points.flatten(0, 1), weight).contiguous().unflatten(0, points.shape[:2])

"""Product of two functions on the sphere, without storing the grid for all edges or atoms at once."""

import torch
from torch import Tensor

from equiformer2.kernels.backend import Backend
from equiformer2.kernels.chunks import cast_to_autocast, no_autocast, point_chunks


def grid_product(pairs: Tensor, to_grid: Tensor, from_grid: Tensor, backend: Backend) -> Tensor:
    """Coefficients of the product of two functions on the sphere, point by point.

    Exact, and so equivariant, on grids that resolve the product (see `model.activation.SwiGLUS2Activation`).

    Args:
        pairs: `[B, R, 2 C]` coefficients of both functions, C channels of the first, then of the second.
        to_grid: `[G, R]`.
        from_grid: `[S, G]`; S may be smaller than R when only some coefficients are needed.
        backend: the implementation.

    Returns:
        `[B, S, C]`.
    """
    (pairs,) = cast_to_autocast(pairs)
    with no_autocast(pairs):
        matrices = to_grid.to(pairs.dtype), from_grid.to(pairs.dtype)
        if backend.takes_expressions():
            return _plain(pairs, *matrices)
        out: Tensor = _GridProduct.apply(pairs, *matrices)
        return out


class _GridProduct(torch.autograd.Function):
    """Chunk by chunk; the backward pass makes the grid points of a chunk once more."""

    @staticmethod
    def forward(ctx, pairs, to_grid, from_grid):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pairs, to_grid, from_grid)
        out = pairs.new_empty(len(pairs), len(from_grid), pairs.shape[2] // 2)
        for part in point_chunks(len(pairs), _bytes_per_row(pairs, to_grid), pairs.device):
            out[part] = _plain(pairs[part], to_grid, from_grid)
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        pairs, to_grid, from_grid = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative is wanted: differentiate the plain expression instead.
            out = _plain(pairs, to_grid, from_grid)
            return *torch.autograd.grad(out, pairs, grad_out, create_graph=True), None, None
        grad = torch.empty_like(pairs, memory_format=torch.contiguous_format)
        for part in point_chunks(len(pairs), 2 * _bytes_per_row(pairs, to_grid), pairs.device):
            first, second = _apply(to_grid, pairs[part]).chunk(2, dim=2)
            points = _apply(from_grid.t(), grad_out[part])
            grad[part] = _apply(to_grid.t(), torch.cat((points * second, points * first), dim=2))
        return grad, None, None


def _plain(pairs: Tensor, to_grid: Tensor, from_grid: Tensor) -> Tensor:
    first, second = _apply(to_grid, pairs).chunk(2, dim=2)
    return _apply(from_grid, first * second)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix [A, B]` on the coefficients of `x [n, B, C]`: one small GEMM each, the fastest on a CPU."""
    return torch.bmm(matrix.expand(len(x), -1, -1), x)


def _bytes_per_row(pairs: Tensor, to_grid: Tensor) -> int:
    return pairs.element_size() * to_grid.shape[0] * pairs.shape[2]

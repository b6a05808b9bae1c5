"""Point-wise nonlinearities on the sphere, without storing the grid for all edges or atoms at once."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiformer2.kernels import gpu
from equiformer2.kernels.backend import plain_expressions, triton_neighbors
from equiformer2.kernels.chunks import cast_to_autocast, no_autocast, point_chunks
from equiformer2.kernels.cpu import sphere as cpu
from equiformer2.kernels.linear import linear


def grid_activation(x: Tensor, to_grid: Tensor, from_grid: Tensor) -> Tensor:
    """S2 activation (paper section 4.3): coefficients to grid points, SiLU, back to coefficients.

    Args:
        x: `[B, R, C]` coefficients of B edges or atoms.
        to_grid: `[G, R]`.
        from_grid: `[S, G]`; S may be smaller than R when only some coefficients are needed.

    Returns:
        `[B, S, C]`.
    """
    (x,) = cast_to_autocast(x)
    with no_autocast(x):
        matrices = to_grid.to(x.dtype), from_grid.to(x.dtype)
        if triton_neighbors() is not None:
            return gpu.separable_s2_activation(x, None, *matrices)
        if plain_expressions(False):
            return _plain(x, *matrices, None)
        return _GridFunction.apply(x, *matrices, None)


def grid_mlp(x: Tensor, to_grid: Tensor, from_grid: Tensor, weight: Tensor) -> Tensor:
    """Feed-forward network on the sphere: grid points of SiLU(weight @ SiLU(x)), back to coefficients.

    The first and the last linear layer of the network act on channels only and commute with the
    transformation between coefficients and grid, so the caller applies them to the K coefficients instead of
    the G > K grid points.

    Args:
        x: `[B, K, C]`; to_grid: `[G, K]`; from_grid: `[K, G]`; weight: `[D, C]`.

    Returns:
        `[B, K, D]`.
    """
    x, to_grid, from_grid, weight = cast_to_autocast(x, to_grid, from_grid, weight)
    with no_autocast(x):
        if triton_neighbors() is not None:
            return gpu.grid_mlp(x, to_grid, from_grid, weight)
        if plain_expressions(False):
            return _plain(x, to_grid, from_grid, weight)
        return _GridFunction.apply(x, to_grid, from_grid, weight)


class GridFactors(NamedTuple):
    """A latitude-longitude grid by its factors.

    Coefficient r at a point is a function of r and the latitude times one of its order and the longitude.

    Attributes:
        to_latitude, from_latitude: `[latitudes, R]`, of `to_grid` and of the transpose of `from_grid`.
        longitude: `[longitudes, 2M + 1]` for orders 0, +1, -1, …, of both.
        row_starts: `[2M + 2]` first coefficient of every order, and R.
    """

    to_latitude: Tensor
    from_latitude: Tensor
    longitude: Tensor
    row_starts: Tensor


def separable_grid_activation(hidden: Tensor, factors: GridFactors, rows: int) -> Tensor:
    """Separable S2 activation (paper section 4.3) by the C++ kernel, where `cpp_kernels()`.

    Every point is made, activated and summed in registers.

    Args:
        hidden: `[B, (1 + R) C]`: C gates of the scalars, then R coefficients.
        factors: of the grid.
        rows: how many coefficients are wanted.

    Returns:
        `[B, rows, C]`; the scalars are SiLU of the gates.
    """
    return _SeparableFunction.apply(hidden.contiguous(), factors, rows)


class _SeparableFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, factors, rows):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, *factors)
        ctx.rows = rows
        return cpu.separable_activation(hidden, _in_arithmetic(factors, hidden), rows)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        hidden, *factors = ctx.saved_tensors
        factors = GridFactors(*factors)
        if torch.is_grad_enabled():
            # A second derivative is wanted: differentiate the plain expression instead.
            out = _separable_expression(hidden, factors, ctx.rows)
            return *torch.autograd.grad(out, hidden, grad_out, create_graph=True), None, None
        factors = _in_arithmetic(factors, hidden)
        return cpu.separable_activation_backward(hidden, factors, grad_out.contiguous()), None, None


def _in_arithmetic(factors: GridFactors, hidden: Tensor) -> GridFactors:
    """In the precision of the kernel: float32 or wider."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    to_latitude, from_latitude, longitude = (t.to(dtype).contiguous() for t in factors[:3])
    return GridFactors(to_latitude, from_latitude, longitude, factors.row_starts)


def _separable_expression(hidden: Tensor, factors: GridFactors, rows: int) -> Tensor:
    counts = factors.row_starts.diff()
    longitude = factors.longitude.repeat_interleave(counts, dim=1)
    to_grid, from_grid = (
        (latitude[:, None] * longitude).flatten(0, 1).to(hidden.dtype)
        for latitude in (factors.to_latitude, factors.from_latitude)
    )
    x = hidden.unflatten(1, (1 + to_grid.shape[1], -1))
    tensors = _plain(x[:, 1:], to_grid, from_grid.t()[:rows], None)
    return torch.cat((silu(x[:, :1]), tensors[:, 1:]), dim=1)


class _GridFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, to_grid, from_grid, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, to_grid, from_grid, weight)
        width = x.shape[2] if weight is None else weight.shape[0]
        out = x.new_empty(len(x), len(from_grid), width)
        for part in point_chunks(len(x), _bytes_per_row(x, to_grid), x.device):
            grid = silu(_apply(to_grid, x[part]), inplace=True)
            if weight is not None:
                hidden = silu(linear(grid.flatten(0, 1), weight), inplace=True)
                grid = hidden.unflatten(0, (len(grid), -1))
            torch.bmm(from_grid.expand(len(grid), -1, -1), grid, out=out[part])
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, to_grid, from_grid, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative is wanted: differentiate the plain expression instead.
            wanted = [i for i in (0, 3) if ctx.needs_input_grad[i]]
            out = _plain(x, to_grid, from_grid, weight)
            grads: list[Tensor | None] = [None] * 4
            for i, grad in zip(
                wanted,
                torch.autograd.grad(out, [(x, weight)[i // 3] for i in wanted], grad_out, create_graph=True),
                strict=True,
            ):
                grads[i] = grad
            return tuple(grads)
        return _backward(x, to_grid, from_grid, weight, grad_out)


def _plain(x: Tensor, to_grid: Tensor, from_grid: Tensor, weight: Tensor | None) -> Tensor:
    grid = silu(_apply(to_grid, x))
    if weight is not None:
        grid = silu(grid @ weight.t())
    return _apply(from_grid, grid)


def _backward(x, to_grid, from_grid, weight, grad_out):  # type: ignore[no-untyped-def]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = None
    if weight is not None:
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    for part in point_chunks(len(x), 2 * _bytes_per_row(x, to_grid), x.device):
        grid = _apply(to_grid, x[part])
        grad_grid = _apply(from_grid.t(), grad_out[part])
        if weight is not None and grad_weight is not None:
            activated = silu(grid).flatten(0, 1)
            hidden = linear(activated, weight)
            grad_hidden = torch.ops.aten.silu_backward(grad_grid.flatten(0, 1), hidden)
            grad_weight += grad_hidden.t() @ activated
            grad_grid = linear(grad_hidden, weight.t()).view(grid.shape)
        grad_grid = torch.ops.aten.silu_backward(grad_grid, grid)
        torch.bmm(to_grid.t().expand(len(grid), -1, -1), grad_grid, out=grad_x[part])
    return grad_x, None, None, None if grad_weight is None else grad_weight.to(weight.dtype)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix [A, B]` on the coefficients of `x [n, B, C]`: one small GEMM each, the fastest on a CPU."""
    return torch.bmm(matrix.expand(len(x), -1, -1), x)


def _bytes_per_row(x: Tensor, to_grid: Tensor) -> int:
    return x.element_size() * to_grid.shape[0] * x.shape[2]

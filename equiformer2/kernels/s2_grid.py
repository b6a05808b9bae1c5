"""Point-wise nonlinearities on the sphere, without storing the grid for all edges or atoms at once."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiformer2.kernels import gpu
from equiformer2.kernels.backend import TRITON, Backend
from equiformer2.kernels.chunks import cast_to_autocast, no_autocast, point_chunks
from equiformer2.kernels.cpu import sphere as cpu
from equiformer2.kernels.linear import linear


def grid_activation(x: Tensor, to_grid: Tensor, from_grid: Tensor, backend: Backend) -> Tensor:
    """S2 activation (paper section 4.3): coefficients to grid points, SiLU, back to coefficients.

    Args:
        x: `[B, R, C]` coefficients of B edges or atoms.
        to_grid: `[G, R]`.
        from_grid: `[S, G]`; S may be smaller than R when only some coefficients are needed.
        backend: the implementation.

    Returns:
        `[B, S, C]`.
    """
    (x,) = cast_to_autocast(x)
    with no_autocast(x):
        matrices = to_grid.to(x.dtype), from_grid.to(x.dtype)
        if backend is TRITON:
            return gpu.separable_s2_activation(x, None, *matrices)
        if backend.takes_expressions():
            return plain(x, *matrices, None)
        return GridFunction.apply(x, *matrices, None)


class GridFactors(NamedTuple):
    """A latitude-longitude grid by its factors.

    Coefficient r at a point is a function of r and the latitude times one of its order and the longitude.

    Attributes:
        to_latitude, from_latitude: `[latitudes, R]`, of `to_grid` and of the transpose of `from_grid`.
        longitude: `[longitudes, 2M + 1]` for orders 0, +1, -1, …, of both. The longitudes may have any order;
            the kernels need fewer operations for opposite ones that stand next to each other, at the end.
        row_starts: `[2M + 2]` first coefficient of every order, and R.
        row_of: `[R]` where a tensor has the coefficients that `to_latitude` and `from_latitude` have order by
            order; the sequence itself where tensors have them so, too.
    """

    to_latitude: Tensor
    from_latitude: Tensor
    longitude: Tensor
    row_starts: Tensor
    row_of: Tensor


def separable_grid_activation(hidden: Tensor, factors: GridFactors, rows: int) -> Tensor:
    """Separable S2 activation (paper section 4.3) by the C++ kernel (`Backend.takes_cpp`).

    Every point is made, activated and summed in registers.

    Args:
        hidden: `[B, (1 + R) C]`: C gates of the scalars, then R coefficients, order by order.
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
        return cpu.separable_activation(hidden, in_arithmetic(factors, hidden), rows)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        hidden, *factors = ctx.saved_tensors
        factors = GridFactors(*factors)
        if torch.is_grad_enabled():
            # A second derivative is wanted: differentiate the plain expression instead.
            out = _separable_expression(hidden, factors, ctx.rows)
            return *torch.autograd.grad(out, hidden, grad_out, create_graph=True), None, None
        factors = in_arithmetic(factors, hidden)
        return cpu.separable_activation_backward(hidden, factors, grad_out.contiguous()), None, None


def in_arithmetic(factors: GridFactors, x: Tensor) -> GridFactors:
    """In the precision of the kernels for `x`: float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    to_latitude, from_latitude, longitude = (t.to(dtype).contiguous() for t in factors[:3])
    return GridFactors(to_latitude, from_latitude, longitude, factors.row_starts, factors.row_of)


def _separable_expression(hidden: Tensor, factors: GridFactors, rows: int) -> Tensor:
    counts = factors.row_starts.diff()
    longitude = factors.longitude.repeat_interleave(counts, dim=1)
    to_grid, from_grid = (
        (latitude[:, None] * longitude).flatten(0, 1).to(hidden.dtype)
        for latitude in (factors.to_latitude, factors.from_latitude)
    )
    x = hidden.unflatten(1, (1 + to_grid.shape[1], -1))
    tensors = plain(x[:, 1:], to_grid, from_grid.t()[:rows], None)
    return torch.cat((silu(x[:, :1]), tensors[:, 1:]), dim=1)


class GridFunction(torch.autograd.Function):
    """SiLU at grid points, with a weight the network of `grid_mlp`, without storing all points."""

    @staticmethod
    def forward(ctx, x, to_grid, from_grid, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, to_grid, from_grid, weight)
        width = x.shape[2] if weight is None else weight.shape[0]
        out = x.new_empty(len(x), len(from_grid), width)
        for part in point_chunks(len(x), bytes_per_row(x, to_grid), x.device):
            grid = silu(_apply(to_grid, x[part]), inplace=True)
            if weight is not None:
                hidden = silu(linear(grid.flatten(0, 1), weight), inplace=True)
                grid = hidden.unflatten(0, (len(grid), -1))
            torch.bmm(from_grid.expand(len(grid), -1, -1), grid, out=out[part])
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            return differentiated_again(ctx, grad_out)
        x, to_grid, from_grid, weight = ctx.saved_tensors
        return _backward(x, to_grid, from_grid, weight, grad_out)


def plain(x: Tensor, to_grid: Tensor, from_grid: Tensor, weight: Tensor | None) -> Tensor:
    """What `GridFunction` computes, as an expression."""
    grid = silu(_apply(to_grid, x))
    if weight is not None:
        grid = silu(grid @ weight.t())
    return _apply(from_grid, grid)


def differentiated_again(ctx, grad_out):  # type: ignore[no-untyped-def]
    """Gradients of the plain expression, for those who want second derivatives."""
    x, to_grid, from_grid, weight = ctx.saved_tensors[:4]
    inputs = {0: x, 3: weight}
    wanted = [i for i in inputs if ctx.needs_input_grad[i]]
    out = plain(x, to_grid, from_grid, weight)
    found = torch.autograd.grad(out, [inputs[i] for i in wanted], grad_out, create_graph=True)
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def _backward(x, to_grid, from_grid, weight, grad_out):  # type: ignore[no-untyped-def]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = None
    if weight is not None:
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    for part in point_chunks(len(x), 2 * bytes_per_row(x, to_grid), x.device):
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


def bytes_per_row(x: Tensor, to_grid: Tensor) -> int:
    """Of the grid points of one edge or atom, with the channels of `x`."""
    return x.element_size() * to_grid.shape[0] * x.shape[2]

"""Nonlinearities on the sphere, without storing the grid for all edges or atoms at once."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiformer2.kernels import gpu
from equiformer2.kernels.backend import TRITON, Backend
from equiformer2.kernels.chunks import cast_to_autocast, chunks, no_autocast
from equiformer2.kernels.cpu import sphere as cpu
from equiformer2.kernels.linear import linear


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

    def in_arithmetic(self, x: Tensor) -> "GridFactors":
        """Cast to the precision in which the kernels compute for `x`: float32 or wider."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        to_latitude, from_latitude, longitude = (t.to(dtype).contiguous() for t in self[:3])
        return GridFactors(to_latitude, from_latitude, longitude, self.row_starts, self.row_of)


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
            return _GridFunction.expression(x, *matrices, None)
        return _GridFunction.apply(x, *matrices, None)


def separable_grid_activation(hidden: Tensor, factors: GridFactors, rows: int) -> Tensor:
    """Separable S2 activation (paper section 4.3) by the C++ kernel (`Backend.takes_cpp`).

    Every point is made, activated and summed in registers.

    Args:
        hidden: `[B, (1 + R) C]`: C gates of the scalars, then R coefficients, order by order.
        factors: of the grid.
        rows: number of coefficients of the result.

    Returns:
        `[B, rows, C]`; the scalars are SiLU of the gates.
    """
    return _SeparableActivation.apply(hidden.contiguous(), factors, rows)


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
            return _GridProduct.expression(pairs, *matrices)
        out: Tensor = _GridProduct.apply(pairs, *matrices)
        return out


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
            return _GridFunction.expression(x, to_grid, from_grid, weight)
        if factors is not None and backend.takes_cpp(x.dtype):
            return _SeparableMlp.apply(x.contiguous(), to_grid, from_grid, weight, factors)
        return _GridFunction.apply(x, to_grid, from_grid, weight)


class _GridFunction(torch.autograd.Function):
    """SiLU at grid points, with a weight the network of `grid_mlp`, without storing all points."""

    @staticmethod
    def forward(ctx, x, to_grid, from_grid, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, to_grid, from_grid, weight)
        width = x.shape[2] if weight is None else weight.shape[0]
        out = x.new_empty(len(x), len(from_grid), width)
        for part in chunks(len(x), _bytes_per_row(x, to_grid), x.device, "points"):
            grid = silu(_apply(to_grid, x[part]), inplace=True)
            if weight is not None:
                hidden = silu(linear(grid.flatten(0, 1), weight), inplace=True)
                grid = hidden.unflatten(0, (len(grid), -1))
            torch.bmm(from_grid.expand(len(grid), -1, -1), grid, out=out[part])
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            return _GridFunction.differentiate_again(ctx, grad_out)
        x, to_grid, from_grid, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight = None
        if weight is not None:
            grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for part in chunks(len(x), 2 * _bytes_per_row(x, to_grid), x.device, "points"):
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

    @staticmethod
    def expression(x: Tensor, to_grid: Tensor, from_grid: Tensor, weight: Tensor | None) -> Tensor:
        """Compute the same under ordinary autograd."""
        grid = silu(_apply(to_grid, x))
        if weight is not None:
            grid = silu(grid @ weight.t())
        return _apply(from_grid, grid)

    @staticmethod
    def differentiate_again(ctx, grad_out):  # type: ignore[no-untyped-def]
        """Give gradients of the expression, which have derivatives themselves."""
        x, to_grid, from_grid, weight = ctx.saved_tensors[:4]
        inputs = {0: x, 3: weight}
        needed = [i for i in inputs if ctx.needs_input_grad[i]]
        out = _GridFunction.expression(x, to_grid, from_grid, weight)
        gradients = torch.autograd.grad(out, [inputs[i] for i in needed], grad_out, create_graph=True)
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, grad in zip(needed, gradients, strict=True):
            grads[i] = grad
        return tuple(grads)


class _SeparableActivation(torch.autograd.Function):
    """Gate activation and S2 activation in one pass."""

    @staticmethod
    def forward(ctx, hidden, factors, rows):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, *factors)
        ctx.rows = rows
        return cpu.separable_activation(hidden, factors.in_arithmetic(hidden), rows)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        hidden, *factors = ctx.saved_tensors
        factors = GridFactors(*factors)
        if torch.is_grad_enabled():
            # A second derivative is wanted: differentiate the plain expression instead.
            out = _SeparableActivation.expression(hidden, factors, ctx.rows)
            return *torch.autograd.grad(out, hidden, grad_out, create_graph=True), None, None
        factors = factors.in_arithmetic(hidden)
        return cpu.separable_activation_backward(hidden, factors, grad_out.contiguous()), None, None

    @staticmethod
    def expression(hidden: Tensor, factors: GridFactors, rows: int) -> Tensor:
        """Compute the same under ordinary autograd."""
        counts = factors.row_starts.diff()
        longitude = factors.longitude.repeat_interleave(counts, dim=1)
        to_grid, from_grid = (
            (latitude[:, None] * longitude).flatten(0, 1).to(hidden.dtype)
            for latitude in (factors.to_latitude, factors.from_latitude)
        )
        x = hidden.unflatten(1, (1 + to_grid.shape[1], -1))
        tensors = _GridFunction.expression(x[:, 1:], to_grid, from_grid.t()[:rows], None)
        return torch.cat((silu(x[:, :1]), tensors[:, 1:]), dim=1)


class _GridProduct(torch.autograd.Function):
    """Chunk by chunk; the backward pass makes the grid points of a chunk once more."""

    @staticmethod
    def forward(ctx, pairs, to_grid, from_grid):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pairs, to_grid, from_grid)
        out = pairs.new_empty(len(pairs), len(from_grid), pairs.shape[2] // 2)
        for part in chunks(len(pairs), _bytes_per_row(pairs, to_grid), pairs.device, "points"):
            out[part] = _GridProduct.expression(pairs[part], to_grid, from_grid)
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        pairs, to_grid, from_grid = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative is wanted: differentiate the plain expression instead.
            out = _GridProduct.expression(pairs, to_grid, from_grid)
            return *torch.autograd.grad(out, pairs, grad_out, create_graph=True), None, None
        grad = torch.empty_like(pairs, memory_format=torch.contiguous_format)
        for part in chunks(len(pairs), 2 * _bytes_per_row(pairs, to_grid), pairs.device, "points"):
            first, second = _apply(to_grid, pairs[part]).chunk(2, dim=2)
            points = _apply(from_grid.t(), grad_out[part])
            grad[part] = _apply(to_grid.t(), torch.cat((points * second, points * first), dim=2))
        return grad, None, None

    @staticmethod
    def expression(pairs: Tensor, to_grid: Tensor, from_grid: Tensor) -> Tensor:
        """Compute the same under ordinary autograd."""
        first, second = _apply(to_grid, pairs).chunk(2, dim=2)
        return _apply(from_grid, first * second)


class _SeparableMlp(torch.autograd.Function):
    """One pass over latitudes and longitudes each way, SiLU on the way, a GEMM in between."""

    @staticmethod
    def forward(ctx, x, to_grid, from_grid, weight, factors):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, to_grid, from_grid, weight, *factors)
        factors = factors.in_arithmetic(x)
        out = x.new_empty(*x.shape[:2], len(weight))
        for part in chunks(len(x), _bytes_per_row(x, to_grid), x.device, "points"):
            points = cpu.to_points(x[part], factors, factors.to_latitude, activate=True)
            hidden = _SeparableMlp.linear(points, weight)
            cpu.from_points(hidden, factors, factors.from_latitude, out[part], activate=True)
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            return _GridFunction.differentiate_again(ctx, grad_out)
        x, to_grid, _, weight, *factors = ctx.saved_tensors
        factors, grad_out = GridFactors(*factors).in_arithmetic(x), grad_out.contiguous()
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for part in chunks(len(x), 2 * _bytes_per_row(x, to_grid), x.device, "points"):
            points = cpu.to_points(x[part], factors, factors.to_latitude)
            activated = silu(points)
            hidden = _SeparableMlp.linear(activated, weight)
            grad = cpu.to_points(grad_out[part], factors, factors.from_latitude, inputs=hidden)
            grad_weight += grad.flatten(0, 1).t() @ activated.flatten(0, 1)
            grad = _SeparableMlp.linear(grad, weight.t())
            cpu.from_points(grad, factors, factors.to_latitude, grad_x[part], inputs=points)
        return grad_x, None, None, grad_weight.to(weight.dtype), None

    @staticmethod
    def linear(points: Tensor, weight: Tensor) -> Tensor:
        """Multiply `points [n, G, C]` by `weight [D, C]`: `[n, G, D]`, contiguous."""
        return linear(points.flatten(0, 1), weight).contiguous().unflatten(0, points.shape[:2])


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Apply `matrix [A, B]` to every `x [n, B, C]`: one small GEMM each, the fastest on a CPU."""
    return torch.bmm(matrix.expand(len(x), -1, -1), x)


def _bytes_per_row(x: Tensor, to_grid: Tensor) -> int:
    """Bytes of the grid points of one edge or atom, with the channels of `x`."""
    return x.element_size() * to_grid.shape[0] * x.shape[2]

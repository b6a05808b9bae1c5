"""The C++ kernels of the sphere grid against all points of the grid at once."""

from collections.abc import Callable

import pytest
import torch
from kernel_twins import Random, factors_in, mlp_on_grid, orders, sphere_factors
from torch import Tensor

from equiformer2.kernels import GridFactors, grid_mlp, separable_grid_activation
from equiformer2.kernels.backend import CPP
from equiformer2.kernels.cpu.library import NO_COMPILER, Compiler

SetBudget = Callable[[int | None], None]


@pytest.fixture(autouse=True)
def library() -> None:
    if Compiler.find() is None:
        pytest.skip(NO_COMPILER)


spheres = pytest.mark.parametrize(
    ("lmax", "mmax", "channels", "pairs"),
    [(4, 2, 5, 0), (4, 2, 5, 3), (6, 3, 33, 0), (6, 6, 20, 8), (8, 8, 17, 5)],
)


@pytest.mark.one_in(3)
@spheres
@pytest.mark.parametrize("kept", [4, None])
def test_activation_on_the_sphere(lmax: int, mmax: int, channels: int, pairs: int, kept: int | None) -> None:
    """Values, gradients and second derivatives against all points of the grid at once."""
    factors = sphere_factors(lmax, mmax, pairs)
    of_row = [i for i, m in enumerate(orders(mmax)) for _ in range(lmax + 1 - abs(m))]
    rows, longitude = len(of_row), factors.longitude[:, of_row]
    to_grid, from_grid = (torch.einsum("br,ar->bar", t, longitude).flatten(0, 1) for t in factors[:2])
    random, results = Random(1), []
    hidden, weights = random(3, (1 + rows) * channels), random(3, kept or rows, channels)

    def plain(x: Tensor) -> Tensor:
        x = x.unflatten(1, (1 + rows, channels))
        points = torch.nn.functional.silu(torch.einsum("gr,brc->bgc", to_grid, x[:, 1:]))
        tensors = torch.einsum("gr,bgc->brc", from_grid[:, :kept], points)
        return torch.cat((torch.nn.functional.silu(x[:, :1]), tensors[:, 1:]), dim=1)

    for dtype in (None, torch.float64, torch.float32, torch.bfloat16):
        x = hidden.to(dtype or torch.float64).requires_grad_()
        given = factors_in(factors, torch.promote_types(x.dtype, torch.float32))
        out = plain(x) if dtype is None else separable_grid_activation(x, given, kept or rows)
        (grad,) = torch.autograd.grad((out * weights.to(x.dtype)).sum(), x, retain_graph=True)
        (slope,) = torch.autograd.grad((out * weights.to(x.dtype)).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        results.append([tensor.double() for tensor in (out, grad, slope, second)])
    theirs, *ours = results
    for found, precision in zip(ours, (1e-12, 1e-5, 0.02), strict=True):
        for a, b in zip(found, theirs, strict=True):
            assert (a - b).norm() <= precision * b.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=str)
def test_gates_of_any_size(dtype: torch.dtype, tolerance: float) -> None:
    factors = factors_in(sphere_factors(1, 1), torch.float32)
    gates = torch.tensor([-200.0, -88.5, -20.0, -3.0, -0.7, -1e-8, 0.0, 0.4, 3.0, 90.0, 1e30, float("nan")])
    hidden = torch.cat((gates, torch.zeros(4 * len(gates)))).unsqueeze(0).to(dtype)
    found = separable_grid_activation(hidden, factors, 4)[0, 0]
    expected = torch.nn.functional.silu(gates.to(dtype))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-30, equal_nan=True)


def anywhere(factors: GridFactors) -> tuple[GridFactors, Tensor, Tensor]:
    """The factors for coefficients that stand in another sequence, and the matrices `[G, R]`, `[R, G]`."""
    rows = Random(2).index(len(factors.row_of) * 5, len(factors.row_of)).argsort()
    longitude = factors.longitude.repeat_interleave(factors.row_starts.diff(), dim=1)
    to_grid, from_grid = (torch.einsum("br,ar->bar", t, longitude).flatten(0, 1) for t in factors[:2])
    back = rows.argsort()
    return factors._replace(row_of=rows), to_grid[:, back], from_grid[:, back].t()


@pytest.mark.one_in(3)
@spheres
@pytest.mark.parametrize("budget", [None, 1])
def test_network_on_the_sphere(
    lmax: int,
    mmax: int,
    channels: int,
    pairs: int,
    budget: int | None,
    set_budget: SetBudget,
) -> None:
    """Values, gradients and second derivatives; coefficients in any sequence."""
    set_budget(budget)
    factors, to_grid, from_grid = anywhere(sphere_factors(lmax, mmax, pairs))
    random, results = Random(1), []
    given = random(3, to_grid.shape[1], channels), random(channels + 2, channels) / channels**0.5
    for dtype in (None, torch.float64, torch.float32, torch.bfloat16):
        inputs = [t.to(dtype or torch.float64).requires_grad_() for t in given]
        x, weight = inputs
        matrices = to_grid.to(x.dtype), from_grid.to(x.dtype)
        if dtype is None:
            out = mlp_on_grid(x, *matrices, weight)
        else:
            wide = factors_in(factors, torch.promote_types(x.dtype, torch.float32))
            out = grid_mlp(x, *matrices, weight, CPP, wide)
        first = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
        slopes = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        found = [out, *first, *slopes]
        if dtype != torch.bfloat16:
            found += torch.autograd.grad(torch.cat([s.flatten() for s in slopes]).square().sum(), inputs)
        results.append([tensor.double() for tensor in found])
    theirs, *ours = results
    for found, precision in zip(ours, (1e-12, 1e-5, 0.03), strict=True):
        for a, b in zip(found, theirs, strict=False):
            assert (a - b).norm() <= precision * b.norm()


def test_no_atoms() -> None:
    factors, to_grid, from_grid = anywhere(sphere_factors(2, 2))
    x, weight = torch.zeros(0, 9, 4, dtype=torch.float64), Random()(4, 4)
    assert grid_mlp(x, to_grid, from_grid, weight, CPP, factors).shape == (0, 9, 4)

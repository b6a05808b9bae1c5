"""Grid nonlinearities and the softmax over edges against their plain twins."""

from collections.abc import Callable

import kernel_twins as twins
import pytest
import torch
import torch_geometric.utils
from kernel_twins import Random, gradients
from torch import Tensor

from equiformer2.kernels import grid_activation, grid_mlp, segment_softmax
from equiformer2.kernels.backend import TORCH

SetBudget = Callable[[int | None], None]

# 1 byte: every row is a chunk. 3,000: an uneven last chunk. None: one chunk.
budgets = pytest.mark.parametrize("budget", [None, 3_000, 1])
numbers_of_rows = pytest.mark.parametrize("rows", [0, 1, 7])


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@budgets
@numbers_of_rows
@pytest.mark.parametrize("kept", [2, 9])
def test_grid_activation(budget: int | None, rows: int, kept: int, set_budget: SetBudget) -> None:
    set_budget(budget)
    random = Random()
    x, to_grid, from_grid = random(rows, 9, 3).requires_grad_(), random(20, 9), random(9, 20)[:kept]
    ours, theirs = (
        grid_activation(x, to_grid, from_grid, TORCH),
        twins.activate_on_grid(x, to_grid, from_grid),
    )
    assert_equal([ours], [theirs])
    assert_equal(gradients([ours], [x]), gradients([theirs], [x]))


@budgets
@numbers_of_rows
@pytest.mark.parametrize("width", [2, 3, 5])
def test_grid_mlp(budget: int | None, rows: int, width: int, set_budget: SetBudget) -> None:
    set_budget(budget)
    random = Random()
    x, weight = random(rows, 9, 3).requires_grad_(), random(width, 3).requires_grad_()
    to_grid, from_grid = random(20, 9), random(9, 20)
    ours, theirs = (
        grid_mlp(x, to_grid, from_grid, weight, TORCH),
        twins.mlp_on_grid(x, to_grid, from_grid, weight),
    )
    assert_equal([ours], [theirs])
    assert_equal(gradients([ours], [x, weight]), gradients([theirs], [x, weight]))


def test_inputs_that_are_views() -> None:
    random = Random()
    x = random(9, 4, 3).transpose(0, 1)
    to_grid, from_grid = random(9, 20).t(), random(20, 9).t()
    assert not x.is_contiguous()
    assert_equal(
        [grid_activation(x, to_grid, from_grid, TORCH)], [twins.activate_on_grid(x, to_grid, from_grid)]
    )


def test_first_and_second_derivatives() -> None:
    random = Random()
    x, weight = random(2, 4, 2).requires_grad_(), random(3, 2).requires_grad_()
    to_grid, from_grid = random(6, 4), random(4, 6)
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x: grid_activation(x, to_grid, from_grid, TORCH), (x,)),
        (lambda x, weight: grid_mlp(x, to_grid, from_grid, weight, TORCH), (x, weight)),
        (lambda x: grid_mlp(x, to_grid, from_grid, weight.detach(), TORCH), (x,)),
    ]
    for call, inputs in cases:
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_two_calls_have_equal_bits() -> None:
    random = Random(dtype=torch.float32)
    x, weight = random(101, 9, 8).requires_grad_(), random(8, 8).requires_grad_()
    to_grid, from_grid = random(20, 9), random(9, 20)
    first, second = (grid_mlp(x, to_grid, from_grid, weight, TORCH) for _ in range(2))
    assert torch.equal(first, second)
    for a, b in zip(gradients([first], [x, weight]), gradients([second], [x, weight]), strict=True):
        assert torch.equal(a, b)


def test_bfloat16() -> None:
    random = Random(dtype=torch.float32)
    x, weight = random(50, 9, 8).requires_grad_(), random(8, 8).requires_grad_()
    to_grid, from_grid = random(20, 9) / 3, random(9, 20) / 4
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [
            grid_activation(x, to_grid, from_grid, TORCH),
            grid_mlp(x, to_grid, from_grid, weight, TORCH),
        ]
    exact = [grid_activation(x, to_grid, from_grid, TORCH), grid_mlp(x, to_grid, from_grid, weight, TORCH)]
    assert {out.dtype for out in rounded} == {torch.bfloat16}
    for ours, theirs in zip(
        [*rounded, *gradients(rounded, [x, weight])], [*exact, *gradients(exact, [x, weight])], strict=True
    ):
        assert (ours.float() - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize("num_edges", [0, 1, 50])
@pytest.mark.parametrize("heads", [1, 3])
def test_softmax_is_torch_geometrics(num_edges: int, heads: int) -> None:
    random = Random()
    logits = (5 * random(num_edges, heads)).requires_grad_()
    target = (2 * random.index(4, num_edges)).sort().values
    ours = segment_softmax(logits, target, 8)
    theirs = torch_geometric.utils.softmax(logits, target, num_nodes=8)
    assert_equal([ours], [theirs])
    assert_equal(gradients([ours], [logits]), gradients([theirs], [logits]))
    totals = ours.new_zeros(8, heads).index_add(0, target, ours)
    assert_equal([totals[target]], [torch.ones_like(ours)])


def test_softmax_of_extreme_logits() -> None:
    logits = torch.tensor([[1e4], [1e4], [-1e4], [-3e4]]).requires_grad_()
    weights = segment_softmax(logits, torch.tensor([0, 0, 0, 2]), 3)
    assert weights.flatten().tolist() == [0.5, 0.5, 0.0, 1.0]
    assert torch.isfinite(torch.autograd.grad(weights[0, 0], logits)[0]).all()


def test_softmax_leaves_bfloat16() -> None:
    logits = Random(dtype=torch.bfloat16)(6, 2)
    weights = segment_softmax(logits, torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    assert weights.dtype == torch.float32
    assert_equal([weights], [segment_softmax(logits.float(), torch.tensor([0, 0, 0, 1, 1, 1]), 2)])

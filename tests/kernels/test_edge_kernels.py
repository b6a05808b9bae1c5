"""Convolution of edges and aggregation of messages against their dense twins."""

from collections.abc import Callable

import kernel_twins as twins
import pytest
import torch
from kernel_twins import Random, gradients, leaves
from torch import Tensor

from equiformer2.kernels import aggregate_messages, chunks, convolve_edges

DIFFERENTIABLE = ("x", "hidden", "radial_weight", "radial_bias", "weights")

degrees = pytest.mark.parametrize(("lmax", "mmax"), [(1, 0), (2, 2), (3, 1), (4, 2), (6, 3)])
numbers_of_edges = pytest.mark.parametrize("num_edges", [0, 1, 7])
# 1 byte: every edge is a chunk. 20,000: several edges, and an uneven last chunk. None: one chunk.
budgets = pytest.mark.parametrize("budget", [None, 20_000, 1])


@pytest.fixture
def set_budget(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    def set_to(budget: int | None) -> None:
        if budget is not None:
            monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", budget)

    return set_to


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@degrees
@numbers_of_edges
@budgets
@pytest.mark.parametrize("shared_orders", [False, True])
def test_convolution(
    lmax: int,
    mmax: int,
    num_edges: int,
    budget: int | None,
    shared_orders: bool,
    set_budget: Callable[[int | None], None],
) -> None:
    set_budget(budget)
    arguments = Random().convolution(num_edges, lmax, mmax, 3, shared_orders)
    inputs = list(leaves(arguments, *DIFFERENTIABLE))
    ours, theirs = convolve_edges(**arguments), twins.convolve(**arguments)
    assert_equal(ours, theirs)
    assert_equal(gradients(ours, inputs), gradients(theirs, inputs))


@degrees
@numbers_of_edges
@budgets
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_aggregation(
    lmax: int,
    mmax: int,
    num_edges: int,
    budget: int | None,
    heads: int | None,
    set_budget: Callable[[int | None], None],
) -> None:
    set_budget(budget)
    random = Random()
    rows = sum(2 * min(l, mmax) + 1 for l in range(lmax + 1))
    values = random(num_edges, rows, 6).requires_grad_()
    alpha = None if heads is None else random(num_edges, heads).requires_grad_()
    # Atom 1 receives nothing.
    target = (2 * random.index(3, num_edges)).sort().values
    arguments = (values, alpha, random.blocks(num_edges, lmax, mmax), target, 6, [0.5 + l for l in range(9)])
    ours, theirs = aggregate_messages(*arguments), twins.aggregate(*arguments)
    assert_equal([ours], [theirs])
    inputs = [values] if alpha is None else [values, alpha]
    assert_equal(gradients([ours], inputs), gradients([theirs], inputs))


@budgets
def test_aggregation_of_the_first_orders(
    budget: int | None, set_budget: Callable[[int | None], None]
) -> None:
    """As the edge-degree embedding uses it: only the rows m = 0 of every block."""
    set_budget(budget)
    random = Random()
    blocks = [block[:, :1] for block in random.blocks(7, 4, 2)]
    values, target = random(7, 5, 4).requires_grad_(), random.index(3, 7).sort().values
    arguments = (values, None, blocks, target, 3, [1.0] * 5)
    ours, theirs = aggregate_messages(*arguments), twins.aggregate(*arguments)
    assert_equal([ours], [theirs])
    assert_equal(gradients([ours], [values]), gradients([theirs], [values]))


@pytest.mark.parametrize("shared_orders", [False, True])
@pytest.mark.parametrize(("lmax", "mmax"), [(1, 1), (2, 1)])
def test_convolution_against_finite_differences(lmax: int, mmax: int, shared_orders: bool) -> None:
    arguments = Random().convolution(2, lmax, mmax, 1, shared_orders, num_atoms=2)
    inputs = list(leaves(arguments, *DIFFERENTIABLE))

    def call(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        changed = dict(zip(DIFFERENTIABLE, (x, hidden, weight, bias, list(weights)), strict=True))
        return tuple(convolve_edges(**(arguments | changed)))

    assert torch.autograd.gradcheck(call, inputs)


def test_aggregation_against_finite_differences() -> None:
    random = Random()
    blocks, target = random.blocks(3, 2, 1), torch.tensor([0, 0, 2])

    def call(values: Tensor, alpha: Tensor) -> Tensor:
        return aggregate_messages(values, alpha, blocks, target, 3, [1.0, 2.0, 0.5])

    inputs = (random(3, 7, 4).requires_grad_(), random(3, 2).requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)


def test_gradients_with_respect_to_the_frames() -> None:
    """Frames that need gradients take a plain path, with second derivatives too."""
    arguments = Random().convolution(5, 3, 2, 2, shared_orders=False)
    inputs = list(leaves(arguments, "blocks", *DIFFERENTIABLE))
    ours, theirs = convolve_edges(**arguments), twins.convolve(**arguments)
    assert_equal(ours, theirs)
    assert_equal(gradients(ours, inputs), gradients(theirs, inputs))

    random = Random()
    blocks = [block.requires_grad_() for block in random.blocks(2, 1, 1)]
    values, alpha = random(2, 4, 2).requires_grad_(), random(2, 1).requires_grad_()
    target = torch.tensor([0, 1])

    def call(values: Tensor, alpha: Tensor, *blocks: Tensor) -> Tensor:
        return aggregate_messages(values, alpha, list(blocks), target, 2, [1.0, 2.0])

    assert torch.autograd.gradcheck(call, (values, alpha, *blocks))
    assert torch.autograd.gradgradcheck(call, (values, alpha, *blocks))


def test_a_second_derivative_through_fixed_frames_is_refused() -> None:
    arguments = Random().convolution(3, 1, 1, 2, shared_orders=False)
    (x,) = leaves(arguments, "x")
    total = sum((out**2).sum() for out in convolve_edges(**arguments))
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@budgets
def test_two_calls_have_equal_bits(budget: int | None, set_budget: Callable[[int | None], None]) -> None:
    set_budget(budget)
    arguments = Random(dtype=torch.float32).convolution(301, 3, 2, 5, False, num_atoms=20)
    inputs = list(leaves(arguments, *DIFFERENTIABLE))
    first, second = convolve_edges(**arguments), convolve_edges(**arguments)
    again = gradients(first, inputs), gradients(second, inputs)
    random = Random(dtype=torch.float32)
    values, alpha = random(301, 14, 4).requires_grad_(), random(301, 2).requires_grad_()
    sums = [
        aggregate_messages(values, alpha, arguments["blocks"], arguments["target"], 20, [1.0] * 4)
        for _ in range(2)
    ]
    again[0].extend(gradients([sums[0]], [values, alpha]))
    again[1].extend(gradients([sums[1]], [values, alpha]))
    for a, b in zip([*first, sums[0], *again[0]], [*second, sums[1], *again[1]], strict=True):
        assert torch.equal(a, b)


def test_bfloat16() -> None:
    arguments = Random(dtype=torch.float32).convolution(40, 3, 2, 8, False, num_atoms=6)
    inputs = list(leaves(arguments, *DIFFERENTIABLE))
    exact = convolve_edges(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = convolve_edges(**arguments)
        total = aggregate_messages(
            rounded[0][:, None, :4].expand(-1, 14, -1),
            None,
            arguments["blocks"],
            arguments["target"],
            6,
            [1.0] * 4,
        )
    assert {out.dtype for out in rounded} == {torch.bfloat16}
    assert total.dtype == torch.float32
    grads = gradients(rounded, inputs)
    assert {grad.dtype for grad in grads} == {torch.float32}
    expected = [*exact, *gradients(exact, inputs)]
    for ours, theirs in zip([*rounded, *grads], expected, strict=True):
        assert (ours.float() - theirs).norm() <= 0.02 * theirs.norm()


def test_chunks_cover_every_row_once() -> None:
    for rows in (0, 1, 7, 100):
        for bytes_per_row in (1, 10**6, 10**7, 10**9):
            parts = list(chunks.chunks(rows, bytes_per_row, torch.device("cpu")))
            assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
            sizes = [part.stop - part.start for part in parts]
            assert all(size * bytes_per_row <= max(chunks.CPU_CHUNK_BYTES, bytes_per_row) for size in sizes)

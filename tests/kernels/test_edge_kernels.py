"""Convolution of edges and aggregation of messages against their dense twins."""

from collections.abc import Callable

import kernel_twins as twins
import pytest
import torch
from kernel_twins import Random, gradients, leaves
from torch import Tensor

from equiformer2.kernels import SO2Weights, attend, chunks, convolve_edges, pack_blocks, sum_rotated
from equiformer2.kernels.backend import CPP, TORCH, Backend
from equiformer2.kernels.cpu.library import NO_COMPILER, Compiler

DIFFERENTIABLE = ("x", "hidden", "radial_weight", "radial_bias", "weights", "bias")

degrees = pytest.mark.parametrize(("lmax", "mmax"), [(1, 0), (2, 2), (3, 1), (4, 2), (6, 3)])
numbers_of_edges = pytest.mark.parametrize("num_edges", [0, 1, 7])
# 1 byte: every edge is a chunk. 20,000: several edges, and an uneven last chunk. None: one chunk.
budgets = pytest.mark.parametrize("budget", [None, 20_000, 1])


@pytest.fixture(params=[TORCH, CPP], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Torch operations and the C++ kernels."""
    if request.param is CPP and Compiler.find() is None:
        pytest.skip(NO_COMPILER)
    return request.param


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def convolve(
    backend: Backend, blocks: list[Tensor], weights: list[Tensor], bias: Tensor, **others: Tensor
) -> list[Tensor]:
    lmax, packed = len(blocks) - 1, pack_blocks(blocks)
    so2 = SO2Weights(weights[0], bias, tuple(weights[1:]))
    fixed = {"packed": packed, "weights": so2, "lmax": lmax, "backend": backend}
    return list(convolve_edges(x_target=others["x"], **fixed, **others))


@degrees
@numbers_of_edges
@budgets
@pytest.mark.parametrize("shared_orders", [False, True])
def test_convolution(
    backend: Backend,
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
    ours, theirs = convolve(backend, **arguments), list(twins.convolve(**arguments))
    assert_equal(ours, theirs)
    assert_equal(gradients(ours, inputs), gradients(theirs, inputs))


class Attention:
    """Arguments of `attend` and its twin."""

    def __init__(self, backend: Backend, num_edges: int, lmax: int, mmax: int, heads: int) -> None:
        random = Random()
        self.backend = backend
        self.lmax, self.mmax, self.heads = lmax, mmax, heads
        rows = sum(2 * min(l, mmax) + 1 for l in range(lmax + 1))
        self.hidden, self.alpha = random(num_edges, 1 + rows * 2), random(num_edges, heads)
        self.blocks = random.blocks(num_edges, lmax, mmax)
        # Atom 1 receives nothing.
        self.target = (2 * random.index(3, num_edges)).sort().values
        inputs = [lmax + 1 - m for m in range(mmax + 1)]
        self.weights = [random((1 + (m > 0)) * n * 2 * heads, n * 2) for m, n in enumerate(inputs)]
        self.bias = random(inputs[0] * 2 * heads)

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        return (hidden[:, 1:] * hidden[:, :1].sigmoid()).unflatten(1, (-1, 2)).sin()

    def inputs(self) -> list[Tensor]:
        return [t.requires_grad_() for t in (self.hidden, self.alpha, self.bias, *self.weights)]

    def ours(
        self,
        hidden: Tensor,
        alpha: Tensor,
        bias: Tensor,
        *weights: Tensor,
        blocks: list[Tensor] | None = None,
    ) -> Tensor:
        degrees = self.lmax, self.mmax
        so2 = SO2Weights(weights[0], bias, weights[1:])
        packed = pack_blocks(blocks or self.blocks)
        return attend(
            hidden, alpha, packed, self.target, 6, self.activation, so2, degrees, degrees, self.backend
        )

    def theirs(self, hidden: Tensor, alpha: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        values = twins.so2_linear(self.activation(hidden), list(weights), bias, self.lmax)
        values = values.unflatten(1, (-1, 2 * self.heads))
        return twins.sum_messages(values, alpha, self.blocks, self.target, 6)


@degrees
@numbers_of_edges
@budgets
@pytest.mark.parametrize("heads", [1, 3])
def test_attention(
    backend: Backend,
    lmax: int,
    mmax: int,
    num_edges: int,
    budget: int | None,
    heads: int,
    set_budget: Callable[[int | None], None],
) -> None:
    set_budget(budget)
    attention = Attention(backend, num_edges, lmax, mmax, heads)
    inputs = attention.inputs()
    ours, theirs = attention.ours(*inputs), attention.theirs(*inputs)
    assert_equal([ours], [theirs])
    assert_equal(gradients([ours], inputs), gradients([theirs], inputs))


def test_attention_that_keeps_only_vectors(backend: Backend) -> None:
    """As the force head uses it: degrees 0 and 1 of the second convolution."""
    attention = Attention(backend, 7, 3, 2, 1)
    hidden, alpha, bias, *weights = attention.inputs()
    whole = attention.ours(hidden, alpha, bias, *weights)
    one = weights[1].unflatten(0, (2, -1))[:, :2].flatten(0, 1)
    so2, packed = SO2Weights(weights[0][:4], bias[:4], (one,)), pack_blocks(attention.blocks)
    kept = attend(
        hidden, alpha, packed, attention.target, 6, attention.activation, so2, (3, 2), (1, 1), backend
    )
    assert_equal([kept], [whole[:, :4]])


@numbers_of_edges
@budgets
def test_sum_of_the_first_orders(
    backend: Backend, num_edges: int, budget: int | None, set_budget: Callable[[int | None], None]
) -> None:
    """As the edge-degree embedding uses it: only the rows m = 0 of every block."""
    set_budget(budget)
    random = Random()
    blocks = random.blocks(num_edges, 4, 2)
    values, target = random(num_edges, 5, 4).requires_grad_(), random.index(3, num_edges).sort().values
    ours = sum_rotated(values, pack_blocks(blocks), target, 3, (4, 2), backend)
    theirs = twins.sum_messages(values, None, [block[:, :1] for block in blocks], target, 3)
    assert_equal([ours], [theirs])
    assert_equal(gradients([ours], [values]), gradients([theirs], [values]))


@pytest.mark.parametrize("shared_orders", [False, True])
@pytest.mark.parametrize(("lmax", "mmax"), [(1, 1), (2, 1)])
def test_convolution_against_finite_differences(
    backend: Backend, lmax: int, mmax: int, shared_orders: bool
) -> None:
    arguments = Random().convolution(2, lmax, mmax, 1, shared_orders, num_atoms=2)
    inputs = list(leaves(arguments, *DIFFERENTIABLE))

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, hidden, weight, bias, *rest = inputs
        changed = dict(zip(DIFFERENTIABLE, (x, hidden, weight, bias, rest[:-1], rest[-1]), strict=True))
        return tuple(convolve(backend, **(arguments | changed)))

    assert torch.autograd.gradcheck(call, inputs)


def test_attention_against_finite_differences(backend: Backend) -> None:
    attention = Attention(backend, 3, 2, 1, 2)
    assert torch.autograd.gradcheck(attention.ours, attention.inputs())


def test_gradients_with_respect_to_the_frames(backend: Backend) -> None:
    """Frames that need gradients take a plain path, with second derivatives too."""
    arguments = Random().convolution(5, 3, 2, 2, shared_orders=False)
    inputs = list(leaves(arguments, "blocks", *DIFFERENTIABLE))
    ours, theirs = convolve(backend, **arguments), list(twins.convolve(**arguments))
    assert_equal(ours, theirs)
    assert_equal(gradients(ours, inputs), gradients(theirs, inputs))

    attention = Attention(backend, 2, 1, 1, 1)
    inputs = attention.inputs()
    blocks = [block.requires_grad_() for block in attention.blocks]

    def call(*inputs: Tensor) -> Tensor:
        return attention.ours(*inputs[:-2], blocks=list(inputs[-2:]))

    assert torch.autograd.gradcheck(call, (*inputs, *blocks))
    assert torch.autograd.gradgradcheck(call, (*inputs, *blocks))


def test_a_second_derivative_through_fixed_frames_is_refused(backend: Backend) -> None:
    arguments = Random().convolution(3, 1, 1, 2, shared_orders=False)
    (x,) = leaves(arguments, "x")
    total = sum((out**2).sum() for out in convolve(backend, **arguments))
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.one_in(3)
@budgets
def test_two_calls_have_equal_bits(
    backend: Backend, budget: int | None, set_budget: Callable[[int | None], None]
) -> None:
    set_budget(budget)
    arguments = Random(dtype=torch.float32).convolution(301, 3, 2, 5, False, num_atoms=20)
    inputs = list(leaves(arguments, *DIFFERENTIABLE))
    first, second = convolve(backend, **arguments), convolve(backend, **arguments)
    attention = Attention(backend, 301, 3, 2, 2)
    once, twice = (attention.ours(*attention.inputs()) for _ in range(2))
    again = gradients([*first, once], [*inputs, *attention.inputs()])
    for a, b in zip(
        [*first, once, *again],
        [*second, twice, *gradients([*second, twice], [*inputs, *attention.inputs()])],
        strict=True,
    ):
        assert torch.equal(a, b)


def test_bfloat16(backend: Backend) -> None:
    arguments = Random(dtype=torch.float32).convolution(40, 3, 2, 8, False, num_atoms=6)
    inputs = list(leaves(arguments, *DIFFERENTIABLE))
    exact = convolve(backend, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = convolve(backend, **arguments)
    assert {out.dtype for out in rounded} == {torch.bfloat16}
    check_rounding(rounded, exact, inputs)

    attention = Attention(backend, 40, 3, 2, 2)
    parts = [part.detach().float().requires_grad_() for part in attention.inputs()]
    attention.blocks = [block.float() for block in attention.blocks]
    exact = [attention.ours(*parts)]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [attention.ours(*parts)]
    assert rounded[0].dtype == torch.float32
    check_rounding(rounded, exact, parts)


def check_rounding(rounded: list[Tensor], exact: list[Tensor], inputs: list[Tensor]) -> None:
    grads = gradients(rounded, inputs)
    assert {grad.dtype for grad in grads} == {torch.float32}
    expected = [*exact, *gradients(exact, inputs)]
    for ours, theirs in zip([*rounded, *grads], expected, strict=True):
        assert 0 < (ours.float() - theirs).norm() <= 0.02 * theirs.norm()


def test_chunks_cover_every_row_once() -> None:
    for rows in (0, 1, 7, 100):
        for bytes_per_row in (1, 10**6, 10**7, 10**9):
            parts = list(chunks.chunks(rows, bytes_per_row, torch.device("cpu")))
            assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
            sizes = [part.stop - part.start for part in parts]
            assert all(size * bytes_per_row <= max(chunks.CPU_CHUNK_BYTES, bytes_per_row) for size in sizes)

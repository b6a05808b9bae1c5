"""The C++ kernels where they differ from torch: whole vectors and tails, all degrees, several threads."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from kernel_twins import Random, factors_in, gradients, leaves, sphere_factors
from torch import Tensor

from equiformer2.kernels import (
    SO2Weights,
    attend,
    convolve_edges,
    pack_blocks,
    sum_rotated,
)
from equiformer2.kernels.backend import CPP, TORCH, Backend
from equiformer2.kernels.cpu import edges as cpu
from equiformer2.kernels.cpu import sphere
from equiformer2.kernels.cpu.library import NO_COMPILER, Compiler
from equiformer2.kernels.so2 import gauss_values

# A vector holds 16 float32 or 8 float64: one whole, whole and tail, several with and without tail.
sizes = pytest.mark.parametrize(
    ("lmax", "mmax", "channels", "heads"), [(5, 2, 16, 4), (7, 4, 17, 1), (8, 8, 33, 3), (2, 2, 48, 6)]
)
# Largest allowed error relative to torch in float64; what rounds the operands to bfloat16 has its precision.
PRECISIONS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02}
precisions = pytest.mark.parametrize("dtype", PRECISIONS, ids=str)


@pytest.fixture(autouse=True)
def library() -> None:
    if Compiler.find() is None:
        pytest.skip(NO_COMPILER)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(call: Callable[..., list[Tensor]], inputs: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Outputs and gradients: of torch in float64 (`dtype` None), or of the C++ kernels."""
    wide = torch.float64 if dtype in (None, torch.float64) else torch.float32
    inputs = [tensor.detach().to(wide).requires_grad_() for tensor in inputs]
    rounding = torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else nullcontext()
    with rounding:
        outputs = call(TORCH if dtype is None else CPP, *inputs)
    return [tensor.double() for tensor in [*outputs, *gradients(outputs, inputs)]]


def assert_close(call: Callable[..., list[Tensor]], inputs: list[Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(run(call, inputs, dtype), run(call, inputs, None), strict=True):
        assert (ours - theirs).norm() <= PRECISIONS[dtype] * theirs.norm()


@sizes
@precisions
@pytest.mark.parametrize("own_targets", [False, True])
def test_convolution(
    lmax: int, mmax: int, channels: int, heads: int, dtype: torch.dtype, own_targets: bool
) -> None:
    """With features of the targets of their own, too: gradients of both sides are then two tensors."""
    random = Random()
    # Shared radial weights in half of the cases.
    arguments = random.convolution(5, lmax, mmax, channels, heads > 1 and own_targets, num_atoms=4)
    targets = random(3, (lmax + 1) ** 2, channels)
    target = (arguments["target"] % 3).sort().values if own_targets else arguments["target"]
    inputs = list(leaves(arguments, "x", "hidden", "radial_weight", "radial_bias", "weights", "bias"))

    def call(
        backend: Backend, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor
    ) -> list[Tensor]:
        so2 = SO2Weights(rest[0], rest[mmax + 1], rest[1 : mmax + 1])
        packed = pack_blocks(arguments["blocks"]).to(x.dtype)
        x_target = rest[-1] if own_targets else x
        sides = x, x_target, packed, arguments["source"], target
        shared = arguments["shared_orders"]
        return list(convolve_edges(*sides, hidden, weight, bias, so2, 2, lmax, shared, backend))

    assert_close(call, [*inputs, targets] if own_targets else inputs, dtype)


@sizes
@precisions
def test_attention(lmax: int, mmax: int, channels: int, heads: int, dtype: torch.dtype) -> None:
    random = Random()
    rows = sum(2 * min(l, mmax) + 1 for l in range(lmax + 1))
    packed, target = pack_blocks(random.blocks(5, lmax, mmax)), torch.tensor([0, 2, 2, 2, 3])
    counts = [lmax + 1 - m for m in range(mmax + 1)]
    weights = [random((1 + (m > 0)) * n * channels, n * 2) for m, n in enumerate(counts)]
    inputs = [random(5, rows * 2), random(5, heads), random(counts[0] * channels), *weights]

    def call(backend: Backend, hidden: Tensor, alpha: Tensor, bias: Tensor, *weights: Tensor) -> list[Tensor]:
        so2 = SO2Weights(weights[0], bias, weights[1:])
        some = hidden, alpha, packed.to(alpha.dtype), target, 5
        degrees = lmax, mmax
        activate = lambda h: h.unflatten(1, (rows, 2)).sin()  # noqa: E731
        return [attend(*some, activate, so2, degrees, degrees, backend)]

    assert_close(call, inputs, dtype)


@sizes
def test_embedding(lmax: int, mmax: int, channels: int, heads: int) -> None:
    random = Random()
    packed, target = pack_blocks(random.blocks(5, lmax, mmax)), torch.tensor([0, 2, 2, 2, 3])

    def call(backend: Backend, values: Tensor) -> list[Tensor]:
        return [sum_rotated(values, packed.to(values.dtype), target, 5, (lmax, mmax), backend)]

    for dtype in (torch.float64, torch.float32):
        assert_close(call, [random(5, lmax + 1, channels)], dtype)


class Arguments:
    """Arguments for every kernel: 41 edges of 7 atoms, most of them into one."""

    def __init__(self, channels: int) -> None:
        random, self.degrees = Random(dtype=torch.float32), (3, 2)
        self.x, self.x_target = random(7, 16, channels), random(7, 16, channels)
        self.source = random.index(7, 41)
        self.target = torch.tensor([0] * 3 + [2] * 25 + [3] + [5] * 12)
        self.packed = pack_blocks(random.blocks(41, *self.degrees))
        self.radial, self.bias = random(41, 9 * 2 * channels), random(9 * 2 * channels)
        counts = [4, 3, 3, 3, 2, 2, 2]
        self.grads = [random(41, n * 2 * channels) for n in counts]
        self.products, self.alpha = [random(41, n * channels) for n in counts], random(41, 1)
        self.values = gauss_values(self.products, None)
        self.value_bias = random(4 * channels)
        self.factors = factors_in(sphere_factors(3, 2), torch.float32)
        self.hidden, self.grad_out = random(41, 15 * channels), random(41, 14, channels)
        self.points = random(41, 35, channels)

    def bits(self) -> list[Tensor]:
        edges = self.x, self.x_target, self.source, self.target, self.packed, self.radial, self.bias
        found = cpu.gather_rotate(*edges, self.degrees, False)
        for same in (False, True):
            grad_x, other = torch.zeros_like(self.x), torch.zeros_like(self.x)
            totals = grad_x, grad_x if same else other
            found += [cpu.gather_rotate_backward(*edges, self.grads, *totals, self.degrees, False), *totals]
        out, both = torch.zeros_like(self.x), (self.degrees, self.degrees)
        messages = self.alpha, self.packed, self.target
        cpu.rotate_sum(self.products, self.value_bias, *messages, out, *both)
        sent = self.values, *messages
        grads, grad_alpha = cpu.rotate_sum_backward(self.x, *sent, *both, torch.float32)
        assert grad_alpha is not None
        found += [out, *grads, grad_alpha, sphere.separable_activation(self.hidden, self.factors, 14)]
        found.append(sphere.separable_activation_backward(self.hidden, self.factors, self.grad_out))
        latitude, coefficients = self.factors.to_latitude, torch.empty_like(self.grad_out)
        sphere.from_points(self.points, self.factors, latitude, coefficients, inputs=self.points)
        points = sphere.to_points(self.grad_out, self.factors, latitude, inputs=self.points)
        return [*found, coefficients, points]


@pytest.mark.parametrize("channels", [5, 40])
def test_results_do_not_depend_on_the_number_of_threads(
    channels: int, with_threads: Callable[[int], None]
) -> None:
    arguments, results = Arguments(channels), []
    for threads in (1, 2, 3, 8):
        with_threads(threads)
        assert torch.get_num_threads() == threads
        results.append(arguments.bits())
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert torch.equal(a, b)


def change(arguments: Arguments, name: str, value: object) -> Arguments:
    setattr(arguments, name, value)
    return arguments


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("source", lambda t: t.int(), "source must be a contiguous torch.int64 tensor"),
        ("source", lambda t: t[:40], r"target must be .* shape \(40,\)"),
        ("x", lambda t: t.double(), "x must be a contiguous torch.float32"),
        ("x", lambda t: t[:, :9], "x must be .* with the strides"),
        ("x_target", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "x_target must be .* strides"),
        ("x_target", lambda t: t.to("meta"), "x_target must be .* on the CPU, not .* on meta"),
        ("packed", lambda t: t[:, :-1].contiguous(), "packed must be"),
        ("bias", lambda t: t.bfloat16(), "bias must be"),
        ("grads", lambda t: t[:4], "grads must be 7 tensors, not 4"),
        ("grads", lambda t: [t[0][:, 1:], *t[1:]], "grads must be a contiguous"),
        ("products", lambda t: [t[0].double(), *t[1:]], "must be a contiguous torch.float64"),
        ("values", lambda t: t[:, 1:], "values must be a contiguous"),
        ("alpha", lambda t: t.expand(-1, 2).contiguous(), "5 channels cannot be shared by 2 heads"),
        ("values", lambda t: None, "attention weights need values"),
        ("value_bias", lambda t: t[1:], "bias must be"),
        ("hidden", lambda t: t[:, 1:].contiguous(), "hidden must be"),
        ("grad_out", lambda t: t[:40], "grad_out must be"),
        ("factors", lambda t: t._replace(row_starts=t.row_starts.int()), "row_starts must be"),
        ("factors", lambda t: t._replace(longitude=t.longitude.double()), "longitude must be"),
        ("factors", lambda t: t._replace(row_of=t.row_of[1:]), "row_of must be"),
        ("points", lambda t: t[:, :34], "inputs must be"),
        ("points", lambda t: t.double(), "latitude must be"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused(
    name: str, changed: Callable[[object], object], message: str
) -> None:
    arguments = Arguments(5)
    with pytest.raises(ValueError, match=message):
        change(arguments, name, changed(getattr(arguments, name))).bits()

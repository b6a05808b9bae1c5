"""The kernels once more, written for reading: dense, one loop per index, ordinary autograd."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiformer2.kernels import GridFactors


def m_major(lmax: int, mmax: int) -> list[tuple[int, int]]:
    """(l, m) of every coefficient in the layout of the SO(2) convolutions."""
    pairs = [(l, 0) for l in range(lmax + 1)]
    for m in range(1, mmax + 1):
        pairs += [(l, m) for l in range(m, lmax + 1)]
        pairs += [(l, -m) for l in range(m, lmax + 1)]
    return pairs


def row(m: int) -> int:
    """Row of order m in a Wigner-D block: 0, +1, -1, +2, -2, …"""
    return 0 if m == 0 else 2 * abs(m) - (m > 0)


def rotate(x: Tensor, blocks: list[Tensor]) -> Tensor:
    """`[E, K, C]` to m-major `[E, R, C]`."""
    lmax, mmax = len(blocks) - 1, (blocks[-1].shape[1] - 1) // 2
    rows = [
        torch.einsum("ek,ekc->ec", blocks[l][:, row(m)], x[:, l * l : (l + 1) ** 2])
        for l, m in m_major(lmax, mmax)
    ]
    return torch.stack(rows, dim=1)


def rotate_back(y: Tensor, blocks: list[Tensor]) -> Tensor:
    """m-major `[E, R, C]` to `[E, K, C]`."""
    lmax, mmax = len(blocks) - 1, (blocks[-1].shape[1] - 1) // 2
    degrees = [y.new_zeros(len(y), 2 * l + 1, y.shape[2]) for l in range(lmax + 1)]
    for k, (l, m) in enumerate(m_major(lmax, mmax)):
        degrees[l] = degrees[l] + torch.einsum("ek,ec->ekc", blocks[l][:, row(m)], y[:, k])
    return torch.cat(degrees, dim=1)


def convolve(
    x: Tensor,
    blocks: list[Tensor],
    source: Tensor,
    target: Tensor,
    hidden: Tensor,
    radial_weight: Tensor,
    radial_bias: Tensor,
    weights: list[Tensor],
    bias: Tensor,
    extra: int,
    shared_orders: bool,
) -> tuple[Tensor, Tensor]:
    lmax, mmax = len(blocks) - 1, len(weights) - 1
    rotated = rotate(torch.cat((x[source], x[target]), dim=2), blocks)
    features = dict(zip(m_major(lmax, mmax), rotated.unbind(1), strict=True))
    radial = iter((hidden @ radial_weight.t() + radial_bias).split(2 * x.shape[2], dim=1))
    per_degree = list(radial) if shared_orders else []
    outputs = []
    for m, weight in enumerate(weights):
        factors = per_degree[m:] if shared_orders else [next(radial) for _ in range(m, lmax + 1)]
        inputs = [
            features[l, sign * m] * factor
            for sign in ((1,) if m == 0 else (1, -1))
            for l, factor in zip(range(m, lmax + 1), factors, strict=True)
        ]
        matrix = real_matrix(weight) if m > 0 else weight
        outputs.append(torch.cat(inputs, dim=1) @ matrix.t() + (bias if m == 0 else 0))
    out = torch.cat(outputs, dim=1)
    return out[:, :extra], out[:, extra:]


def so2_linear(x: Tensor, weights: list[Tensor], bias: Tensor, lmax: int) -> Tensor:
    """m-major `[E, R, C]` through one matrix per order, the complex ones written out."""
    outputs, start = [], 0
    for m, weight in enumerate(weights):
        rows = (1 + (m > 0)) * (lmax + 1 - m)
        inputs = x[:, start : start + rows].flatten(1)
        start += rows
        outputs.append(inputs @ (real_matrix(weight) if m > 0 else weight).t() + (bias if m == 0 else 0))
    return torch.cat(outputs, dim=1)


def real_matrix(weight: Tensor) -> Tensor:
    """`[2 out, in]`, real part above imaginary part, as the matrix on (+m, -m)."""
    real, imaginary = weight.chunk(2)
    return torch.cat((torch.cat((real, -imaginary), dim=1), torch.cat((imaginary, real), dim=1)))


def sum_messages(
    values: Tensor, alpha: Tensor | None, blocks: list[Tensor], target: Tensor, num_targets: int
) -> Tensor:
    if alpha is not None:
        values = values * alpha.repeat_interleave(values.shape[2] // alpha.shape[1], dim=1).unsqueeze(1)
    messages = rotate_back(values, blocks)
    totals = [messages[target == i].sum(0) for i in range(num_targets)]
    return torch.stack(totals)


def activate_on_grid(x: Tensor, to_grid: Tensor, from_grid: Tensor) -> Tensor:
    points = silu(torch.einsum("gr,brc->bgc", to_grid, x))
    return torch.einsum("sg,bgc->bsc", from_grid, points)


def mlp_on_grid(x: Tensor, to_grid: Tensor, from_grid: Tensor, weight: Tensor) -> Tensor:
    points = silu(silu(torch.einsum("gk,bkc->bgc", to_grid, x)) @ weight.t())
    return torch.einsum("kg,bgc->bkc", from_grid, points)


class Random:
    """Random tensors of one data type, and everything that the kernels take."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def index(self, high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=self.generator)

    def blocks(self, num_edges: int, lmax: int, mmax: int) -> list[Tensor]:
        """Any matrices will do: no kernel relies on their being rotations."""
        return [self(num_edges, 2 * min(l, mmax) + 1, 2 * l + 1) for l in range(lmax + 1)]

    def convolution(
        self, num_edges: int, lmax: int, mmax: int, channels: int, shared_orders: bool, num_atoms: int = 4
    ) -> dict[str, Tensor | list[Tensor] | bool | int]:
        inputs = [lmax + 1 - m for m in range(mmax + 1)]
        num_radial = 2 * channels * (lmax + 1 if shared_orders else sum(inputs))
        weights = [self(6 + 2 * m, n * 2 * channels).div(n) for m, n in enumerate(inputs)]
        return {
            "x": self(num_atoms, (lmax + 1) ** 2, channels),
            "blocks": self.blocks(num_edges, lmax, mmax),
            "source": self.index(num_atoms, num_edges),
            "target": self.index(num_atoms, num_edges).sort().values,
            "hidden": self(num_edges, 3),
            "radial_weight": self(num_radial, 3),
            "radial_bias": self(num_radial),
            "weights": weights,
            "bias": self(6),
            "extra": 2,
            "shared_orders": shared_orders,
        }


def leaves(arguments: dict[str, object], *names: str) -> Iterator[Tensor]:
    """The named tensors, lists flattened, with gradients switched on."""
    for name in names:
        value = arguments[name]
        for tensor in value if isinstance(value, list) else [value]:
            yield tensor.requires_grad_()


def gradients(outputs: list[Tensor], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of the outputs' products with fixed random numbers."""
    random = Random(seed)
    total = sum((out * random(*out.shape).to(out.dtype)).sum() for out in outputs)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs))


def sphere_factors(lmax: int, mmax: int, pairs: int = 0) -> GridFactors:
    """Grid factors of arbitrary functions, with few latitudes and longitudes.

    The kernel does not rely on their being harmonics. `pairs` of the longitudes are opposite.
    """
    random, counts = Random(), [lmax + 1 - abs(m) for m in orders(mmax)]
    longitude = random(7 + 2 * pairs, len(counts)) / 7**0.5
    longitude[8::2] = longitude[7::2] * torch.tensor([-1.0 if m < 0 else 1.0 for m in orders(mmax)])
    latitudes = random(5, sum(counts)) / sum(counts) ** 0.5, random(5, sum(counts)) / 5**0.5
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return GridFactors(*latitudes, longitude, torch.tensor(starts), torch.arange(sum(counts)))


def orders(mmax: int) -> list[int]:
    return [0, *(sign * m for m in range(1, mmax + 1) for sign in (1, -1))]


def factors_in(factors: GridFactors, dtype: torch.dtype) -> GridFactors:
    return GridFactors(*(tensor.to(dtype) for tensor in factors[:3]), *factors[3:])

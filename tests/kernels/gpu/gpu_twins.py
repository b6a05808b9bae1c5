"""Graphs, random inputs and plain-torch twins for the GPU kernels."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiformer2.kernels.gpu import csr, segment_starts
from equiformer2.kernels.layout import OrderLayout


class Random:
    """Random tensors of one data type on one device; the same numbers everywhere."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.generator, self.device, self.dtype = torch.Generator().manual_seed(seed), device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.device, dtype or self.dtype)

    def graph(self, num_atoms: int, num_edges: int) -> dict[str, Tensor]:
        """Edges sorted by target; the last atom has neither incoming nor outgoing edges."""
        source, target = torch.randint(num_atoms - 1, (2, num_edges), generator=self.generator)
        source, target = source.to(self.device), target.sort().values.to(self.device)
        order, starts = csr(source, num_atoms)
        return {
            "source": source,
            "target": target,
            "source_order": order,
            "source_ptr": starts,
            "target_ptr": segment_starts(target, num_atoms),
        }

    def packed(self, num_edges: int, lmax: int, mmax: int) -> Tensor:
        """Any matrices will do: no kernel relies on their being rotations."""
        size = sum((2 * min(l, mmax) + 1) * (2 * l + 1) for l in range(lmax + 1))
        return self(num_edges, size, dtype=torch.promote_types(self.dtype, torch.float32))

    def radial(self, num_edges: int, lmax: int, mmax: int, channels: int, shared: bool) -> Tensor:
        return self(num_edges, OrderLayout(lmax, mmax).radial_rows(shared) * 2 * channels)


def m_major(lmax: int, mmax: int) -> list[tuple[int, int]]:
    """(l, m) of every row of the m-major layout."""
    pairs = [(l, 0) for l in range(lmax + 1)]
    for m in range(1, mmax + 1):
        pairs += [(l, m) for l in range(m, lmax + 1)] + [(l, -m) for l in range(m, lmax + 1)]
    return pairs


def dense(packed: Tensor, lmax: int, mmax: int, orders: int) -> Tensor:
    """Packed blocks as matrices `[E, R, K]` of the rows |m| <= orders in m-major sequence."""
    blocks, start = [], 0
    for l in range(lmax + 1):
        rows = 2 * min(l, mmax) + 1
        blocks.append(packed[:, start : start + rows * (2 * l + 1)].view(len(packed), rows, 2 * l + 1))
        start += rows * (2 * l + 1)
    pairs = m_major(lmax, min(lmax, orders))
    matrix = packed.new_zeros(len(packed), len(pairs), (lmax + 1) ** 2)
    for i, (l, m) in enumerate(pairs):
        matrix[:, i, l * l : (l + 1) ** 2] = blocks[l][:, 2 * abs(m) - (m > 0)]
    return matrix


def gather_rotate(
    x: Tensor,
    packed: Tensor,
    graph: dict[str, Tensor],
    radial: Tensor,
    lmax: int,
    mmax: int,
    shared: bool,
) -> Tensor:
    both = torch.cat((x[graph["source"]], x[graph["target"]]), dim=2)
    rotated = dense(packed, lmax, mmax, mmax).to(both.dtype) @ both
    groups = [OrderLayout.radial_row(l, abs(m), lmax, shared) for l, m in m_major(lmax, min(lmax, mmax))]
    weights = radial.view(len(radial), OrderLayout(lmax, mmax).radial_rows(shared), 2 * x.shape[2])
    return (rotated * weights[:, groups]).flatten(1)


def rotate_aggregate(
    values: Tensor,
    alpha: Tensor | None,
    packed: Tensor,
    target: Tensor,
    num_atoms: int,
    lmax: int,
    mmax: int,
    values_mmax: int,
    scale: list[float],
) -> Tensor:
    assert values.shape[1] == OrderLayout(lmax, values_mmax).num_rows
    if alpha is not None:
        values = values * alpha.repeat_interleave(values.shape[2] // alpha.shape[1], dim=1)[:, None]
    messages = dense(packed, lmax, mmax, values_mmax).mT @ values
    factors = [scale[l] for l in range(lmax + 1) for _ in range(2 * l + 1)]
    messages = messages * messages.new_tensor(factors)[:, None]
    return messages.new_zeros(num_atoms, *messages.shape[1:]).index_add(0, target, messages)


def segment_softmax(logits: Tensor, target: Tensor, num_atoms: int) -> Tensor:
    parts = [torch.softmax(logits[target == n], dim=0) for n in range(num_atoms)]
    return torch.cat(parts)


def separable_s2_activation(x: Tensor, gates: Tensor | None, to_grid: Tensor, from_grid: Tensor) -> Tensor:
    out = torch.einsum("sg,bgc->bsc", from_grid, silu(torch.einsum("gr,brc->bgc", to_grid, x)))
    return out if gates is None else torch.cat((silu(gates)[:, None], out[:, 1:]), dim=1)


def grid_mlp(x: Tensor, to_grid: Tensor, from_grid: Tensor, weight: Tensor) -> Tensor:
    points = silu(silu(torch.einsum("gk,bkc->bgc", to_grid, x)) @ weight.t())
    return torch.einsum("kg,bgd->bkd", from_grid, points)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the output's product with fixed random numbers."""
    weights = Random(out.device, out.dtype, seed=1)(*out.shape)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the largest element, as rounding errors of sums are; shapes must agree."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        if b.numel():
            error = (a.double() - b.double()).abs().max().item() / max(b.abs().max().item(), 1e-30)
            assert error < tolerance, f"relative error {error:.2e}"

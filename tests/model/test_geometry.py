"""Edge frames, Wigner-D blocks and S2 grids."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from e3nn import o3
from torch import Tensor

from equiformer2.model.so3 import EdgeFrames, S2Grid
from equiformer2.model.so3.grid import grid_matrices, m_major_order, quadrature_weights, truncation_scale

AXES = torch.cat((torch.eye(3), -torch.eye(3))).double()


@contextmanager
def e3nn_in_float64() -> Iterator[None]:
    """e3nn rounds its constants to the default precision."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def directions() -> Tensor:
    """Unit vectors: random ones, all axes, diagonals, and some close to each axis and the charts' border."""
    generator = torch.Generator().manual_seed(0)
    near = [
        AXES + size * torch.randn(6, 3, generator=generator, dtype=torch.float64)
        for size in (1e-2, 1e-5, 1e-8, 1e-12, 1e-16)
    ]
    border = torch.tensor([[0.5, 0.75**0.5, 0.0], [0.3, -(0.75**0.5), 0.4]], dtype=torch.float64)
    diagonals = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 3)
    diagonals = diagonals[diagonals.any(dim=1)]
    scattered = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    every = torch.cat((scattered, AXES, *near, border, diagonals))
    return every / every.norm(dim=1, keepdim=True)


def kept_rows(l: int, mmax: int) -> list[int]:
    """m = 0, +1, -1, +2, -2, … among -l..l."""
    rows = [l]
    for m in range(1, min(l, mmax) + 1):
        rows += [l + m, l - m]
    return rows


@pytest.mark.parametrize("mmax", [0, 1, 2, 8])
def test_blocks_of_rotations_are_e3nns(mmax: int) -> None:
    rotations = o3.rand_matrix(50, dtype=torch.float64)
    blocks = EdgeFrames.from_rotations(rotations, 8, mmax).blocks
    with e3nn_in_float64():
        angles = o3.matrix_to_angles(rotations)
        for l, block in enumerate(blocks):
            expected = o3.wigner_D(l, *angles)[:, kept_rows(l, mmax)]
            torch.testing.assert_close(block, expected, rtol=0, atol=1e-12)


def test_blocks_of_vectors_are_e3nns() -> None:
    """The degree 1 block is the rotation itself; all other degrees must belong to it."""
    vectors = directions()
    blocks = EdgeFrames.from_vectors(2.5 * vectors, torch.full((len(vectors),), 2.5).double(), 8, 8).blocks
    # Rows m = 0, +1, -1 are y, z, x; columns are in e3nn's order x, y, z.
    rotations = blocks[1][:, [2, 0, 1]]
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(len(vectors)).double())
    up = torch.tensor([0.0, 1.0, 0.0]).double().expand(len(vectors), 3)
    torch.testing.assert_close((rotations @ vectors.unsqueeze(2)).squeeze(2), up, rtol=0, atol=2e-14)
    with e3nn_in_float64():
        # Away from its own poles: e3nn's arc cosine loses digits there.
        regular = rotations[:, :, 1][:, 1].abs() < 0.999
        angles = o3.matrix_to_angles(rotations[regular])
        assert regular.sum() > 60
        for l, block in enumerate(blocks):
            expected = o3.wigner_D(l, *angles)[:, kept_rows(l, l)]
            torch.testing.assert_close(block[regular], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_every_direction_turns_to_the_pole(dtype: torch.dtype, tolerance: float) -> None:
    """The spherical harmonics of the edge, rotated into its frame, are those of +y: only m = 0."""
    vectors = directions()
    with e3nn_in_float64():
        harmonics = [o3.spherical_harmonics(l, vectors, True, "component") for l in range(7)]
    frames = EdgeFrames.from_vectors(vectors.to(dtype), vectors.to(dtype).norm(dim=1), 6, 6)
    for l, (block, values) in enumerate(zip(frames.blocks, harmonics, strict=True)):
        assert block.dtype == dtype
        turned = torch.einsum("erk,ek->er", block, values.to(dtype)) / (2 * l + 1) ** 0.5
        expected = torch.zeros(1, 2 * l + 1, dtype=dtype)
        expected[0, 0] = 1
        torch.testing.assert_close(turned, expected.expand_as(turned), rtol=0, atol=tolerance)
        unit = torch.eye(2 * l + 1, dtype=dtype).expand(len(block), -1, -1)
        torch.testing.assert_close(block @ block.transpose(1, 2), unit, rtol=0, atol=tolerance)


def test_rows_beyond_mmax_are_left_out() -> None:
    vectors = directions()
    whole = EdgeFrames.from_vectors(vectors, vectors.norm(dim=1), 6, 6).blocks
    cut = EdgeFrames.from_vectors(vectors, vectors.norm(dim=1), 6, 2).blocks
    for l, block in enumerate(cut):
        torch.testing.assert_close(block, whole[l][:, : min(2 * l, 4) + 1], rtol=0, atol=1e-13)
    # 235 of the 29 x 49 entries of a dense rotation.
    assert sum(block[0].numel() for block in cut) == 235


def test_frames_are_smooth_within_a_chart() -> None:
    """Finite and exact derivatives for every direction, the poles included."""
    vectors = directions()
    sine = (vectors[:, 0] ** 2 + vectors[:, 2] ** 2).sqrt()
    vectors = vectors[(sine - 0.5).abs() > 1e-3].requires_grad_()
    weights = [torch.randn(49, dtype=torch.float64, generator=torch.Generator().manual_seed(1))] * 2

    def total(v: Tensor) -> Tensor:
        blocks = EdgeFrames.from_vectors(v, v.norm(dim=1), 3, 3).blocks
        flat = torch.cat([block.flatten(1) for block in blocks], dim=1)
        return flat @ weights[0].repeat(2)[: flat.shape[1]]

    (grad,) = torch.autograd.grad(total(vectors).sum(), vectors)
    assert torch.isfinite(grad).all()
    assert grad.norm(dim=1).max() < 100
    step = 1e-6
    for axis in torch.eye(3, dtype=torch.float64):
        difference = (total(vectors + step * axis) - total(vectors - step * axis)) / (2 * step)
        torch.testing.assert_close(grad @ axis, difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("lmax", "resolution"), [(1, None), (2, None), (6, None), (4, 18), (6, 18), (8, 18), (4, (10, 11))]
)
def test_grid_and_back_is_the_identity(lmax: int, resolution: int | tuple[int, int] | None) -> None:
    grid = S2Grid(lmax, lmax, resolution, list(range((lmax + 1) ** 2))).double()
    unit = torch.eye((lmax + 1) ** 2, dtype=torch.float64)
    torch.testing.assert_close(grid.from_grid @ grid.to_grid, unit, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("lmax", "mmax", "resolution"), [(3, 1, None), (6, 2, None), (6, 2, 18), (6, 3, 18)])
def test_grid_of_truncated_orders(lmax: int, mmax: int, resolution: int | None) -> None:
    """Degrees that miss orders are scaled on the way to the grid and on the way back."""
    order = m_major_order(lmax, mmax)
    grid = S2Grid(lmax, mmax, resolution, order).double()
    scale = [truncation_scale(int(k**0.5), mmax) ** 2 for k in order]
    expected = torch.tensor(scale, dtype=torch.float64).diag()
    torch.testing.assert_close(grid.from_grid @ grid.to_grid, expected, rtol=0, atol=1e-13)
    assert truncation_scale(mmax, mmax) == 1.0
    assert truncation_scale(3, 1) == pytest.approx((7 / 3) ** 0.5)


def test_grid_points_are_values_of_the_function() -> None:
    """Latitudes from the pole +y, longitudes from +z towards +x, `component` normalization over (L + 1)."""
    lmax, resolution = 4, 12
    to_grid, _ = grid_matrices(lmax, lmax, resolution)
    beta = (torch.arange(resolution).double() + 0.5) * torch.pi / resolution
    alpha = torch.arange(resolution).double() * 2 * torch.pi / resolution
    beta, alpha = torch.meshgrid(beta, alpha, indexing="ij")
    points = torch.stack((beta.sin() * alpha.sin(), beta.cos(), beta.sin() * alpha.cos()), dim=-1)
    with e3nn_in_float64():
        harmonics = o3.spherical_harmonics(list(range(lmax + 1)), points, True, "component")
    degrees = torch.tensor([2 * l + 1 for l in range(lmax + 1) for _ in range(2 * l + 1)])
    expected = harmonics / (degrees * (lmax + 1)).sqrt()
    torch.testing.assert_close(to_grid, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("latitudes", [4, 14, 18])
def test_quadrature_is_exact_for_polynomials(latitudes: int) -> None:
    weights = quadrature_weights(latitudes)
    height = torch.cos((2 * torch.arange(latitudes).double() + 1) * torch.pi / (2 * latitudes))
    for power in range(latitudes):
        mean = 0.0 if power % 2 else 1 / (power + 1)
        assert (weights * height**power).sum().item() == pytest.approx(mean, abs=1e-14)


def test_constants_are_derived_in_float64() -> None:
    """`.double()` gives the exact constants, not float32 values with zeros behind them."""
    order = list(range(9))
    converted = S2Grid(2, 2, 8, order).half().float().double()
    to_grid, from_grid = grid_matrices(2, 2, 8)
    assert torch.equal(converted.to_grid, to_grid.flatten(0, 1))
    assert torch.equal(converted.from_grid, from_grid.flatten(0, 1).t())
    assert not converted.state_dict()

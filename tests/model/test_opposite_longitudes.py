"""The grid's factors for the C++ kernels."""

import pytest
import torch

from equiformer2.model.so3.grid import S2Grid, m_major_order


@pytest.mark.parametrize("resolution", [(8, 5), (8, 6), (14, 14), None], ids=str)
def test_factors_give_the_points_of_the_grid_in_another_sequence(resolution: tuple[int, int] | None) -> None:
    grid = S2Grid(3, 2, resolution, m_major_order(3, 2)).double()
    factors = grid.factors
    of_row = torch.arange(5).repeat_interleave(factors.row_starts.diff())
    points = torch.einsum("br,ar->bar", factors.to_latitude, factors.longitude[:, of_row]).flatten(0, 1)
    expected = grid.to_grid[:, factors.row_of]
    assert points.shape == expected.shape
    distance = (points[:, None] - expected).abs().amax(2)
    assert distance.min(1).values.max() < 1e-12
    assert len(set(distance.argmin(1).tolist())) == len(points)


@pytest.mark.parametrize("longitudes", [5, 6])
def test_opposite_longitudes_are_neighbours(longitudes: int) -> None:
    rows = S2Grid(3, 2, (8, longitudes), m_major_order(3, 2)).factors.longitude
    singles = 2 - longitudes % 2
    signs = torch.tensor([1, 1, -1, 1, -1])
    assert torch.equal(rows[singles::2] * signs, rows[singles + 1 :: 2])

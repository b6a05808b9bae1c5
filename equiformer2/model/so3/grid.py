"""Transformation between irreps coefficients and samples on the sphere."""

import functools
import math

import numpy as np
import torch
from e3nn.o3 import ToS2Grid
from torch import Tensor

from equiformer2.kernels import GridFactors
from equiformer2.kernels.layout import OrderLayout
from equiformer2.model.so3.constants import DerivedConstants


class S2Grid(DerivedConstants):
    """Matrices between coefficients with |m| <= mmax and a latitude-longitude grid (paper section 4.3).

    Args:
        lmax, mmax: degrees and orders of the coefficients.
        resolution: points along latitude and along longitude, one number for both or two; None takes
            `smallest_resolution`.
        order: the coefficients as indices l^2 + l + m, in the sequence wanted.

    Attributes:
        to_grid: `[G, R]`; from_grid: `[R, G]`. G counts latitudes, then longitudes.
        factors: of both matrices, see `GridFactors`.
        order_by_order: whether the coefficients, too, stand order by order (m = 0, +1, -1, …).
    """

    to_grid: Tensor
    from_grid: Tensor
    to_latitude: Tensor
    from_latitude: Tensor
    longitude: Tensor
    row_starts: Tensor
    row_of: Tensor

    def __init__(
        self, lmax: int, mmax: int, resolution: int | tuple[int, int] | None, order: list[int]
    ) -> None:
        super().__init__()
        to_grid, from_grid = grid_matrices(lmax, mmax, resolution)
        self.add_constant("to_grid", to_grid[:, :, order].flatten(0, 1))
        self.add_constant("from_grid", from_grid[:, :, order].flatten(0, 1).t().contiguous())
        columns = [0, *(sign * m for m in range(1, mmax + 1) for sign in (1, -1))]
        orders = [i - math.isqrt(i) ** 2 - math.isqrt(i) for i in order]
        row_of = [row for m in columns for row in range(len(order)) if orders[row] == m]
        to_latitude, from_latitude, longitude = grid_factors(lmax, mmax, resolution)
        self.add_constant("to_latitude", to_latitude[:, [order[row] for row in row_of]])
        self.add_constant("from_latitude", from_latitude[:, [order[row] for row in row_of]])
        self.add_constant("longitude", opposite_pairs(longitude[:, [lmax + m for m in columns]]))
        ends = torch.tensor([orders.count(m) for m in columns]).cumsum(0)
        self.register_buffer("row_starts", torch.cat((ends.new_zeros(1), ends)), persistent=False)
        self.register_buffer("row_of", torch.tensor(row_of), persistent=False)
        self.order_by_order = row_of == sorted(row_of)

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def harmonics(lmax: int, latitudes: int, longitudes: int) -> tuple[np.ndarray, np.ndarray]:
        """Factors of spherical harmonics at grid points, float64: `[latitudes, K]`, `[longitudes, 2L + 1]`.

        Kept, as arrays, which have no device: to derive them takes most of the time of building a network.
        """
        with torch.device("cpu"):
            to_s2 = ToS2Grid(lmax, (latitudes, longitudes), normalization="component", dtype=torch.float64)
        return to_s2.shb.sum(0).numpy(), to_s2.sha.numpy()

    @property
    def factors(self) -> GridFactors:
        """Without the grid points of all coefficients: see there."""
        return GridFactors(self.to_latitude, self.from_latitude, self.longitude, self.row_starts, self.row_of)


def grid_matrices(lmax: int, mmax: int, resolution: int | tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Both matrices for all K coefficients, as float64 `[latitudes, longitudes, K]`.

    Degrees l > mmax miss the orders |m| > mmax; as in the reference they are scaled by
    sqrt((2l + 1) / (2 mmax + 1)) to keep their norm.
    """
    to_latitude, from_latitude, longitude = grid_factors(lmax, mmax, resolution)
    of_coefficient = longitude[:, [lmax + m for l in range(lmax + 1) for m in range(-l, l + 1)]]
    return to_latitude[:, None] * of_coefficient, from_latitude[:, None] * of_coefficient


def grid_factors(
    lmax: int, mmax: int, resolution: int | tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of `grid_matrices` in float64: `[latitudes, K]` of each, `[longitudes, 2 lmax + 1]` of both.

    A spherical harmonic is a function of the latitude times one of the longitude and m.
    """
    if resolution is None:
        resolution = smallest_resolution(lmax, mmax)
    latitudes, longitudes = (resolution, resolution) if isinstance(resolution, int) else resolution
    of_latitude, of_longitude = map(torch.tensor, S2Grid.harmonics(lmax, latitudes, longitudes))
    degrees = [l for l in range(lmax + 1) for _ in range(2 * l + 1)]
    to_latitude = of_latitude * truncation_scales(lmax, mmax).squeeze(1)
    # The inverse is the quadrature with the same harmonics; `component` normalization divides by
    # sqrt((2l+1) (lmax+1)) in one direction and multiplies by it in the other. (e3nn's FromS2Grid is
    # the same matrix with float32 quadrature weights.)
    norm = torch.tensor([(2 * l + 1) * (lmax + 1) for l in degrees], dtype=torch.float64)
    weights = quadrature_weights(latitudes) / longitudes
    return to_latitude, to_latitude * weights[:, None] * norm, of_longitude


def opposite_pairs(longitude: Tensor) -> Tensor:
    """The rows `[longitudes, 2M + 1]` (orders 0, +1, -1, …) with those of opposite angles next to each other.

    Angles are 2 pi a / longitudes. Those that are their own opposites (0 and pi) come first. At opposite
    angles the factors of m < 0, which are sines, differ in sign, here to the last bit.
    """
    count, columns = longitude.shape
    signs = torch.tensor([-1.0 if i and i % 2 == 0 else 1.0 for i in range(columns)], dtype=longitude.dtype)
    rows = [longitude[0]] if count % 2 else [longitude[0], longitude[count // 2]]
    for a in range(1, (count + 1) // 2):
        rows += [longitude[a], longitude[a] * signs]
    return torch.stack(rows)


def smallest_resolution(lmax: int, mmax: int) -> tuple[int, int]:
    """The reference's default: 2 (lmax+1) latitudes, 2 mmax + 1 longitudes (two more when mmax = lmax)."""
    return 2 * (lmax + 1), 2 * mmax + (3 if mmax == lmax else 1)


def quadrature_weights(latitudes: int) -> Tensor:
    """Weights of equally spaced latitudes that integrate polynomials on the sphere exactly, float64, sum 1.

    Kostelec and Rockmore, FFTs on the rotation group (2008), equation 2.13; `latitudes` is even.
    """
    half = latitudes // 2
    theta = (2 * torch.arange(latitudes, dtype=torch.float64) + 1) * math.pi / (4 * half)
    odd = 2 * torch.arange(half, dtype=torch.float64) + 1
    return torch.sin(theta) * (torch.sin(theta[:, None] * odd) / odd).sum(1) / half


def truncation_scale(l: int, mmax: int) -> float:
    """sqrt((2l + 1) / (2 mmax + 1)) for degrees that lose orders by the cut |m| <= mmax, else 1."""
    return math.sqrt((2 * l + 1) / (2 * mmax + 1)) if l > mmax else 1.0


def truncation_scales(lmax: int, mmax: int) -> Tensor:
    """`truncation_scale` of every coefficient, `[K, 1]` float64."""
    scales = [truncation_scale(l, mmax) for l in range(lmax + 1) for _ in range(2 * l + 1)]
    return torch.tensor(scales, dtype=torch.float64).unsqueeze(1)


def m_major_order(lmax: int, mmax: int) -> list[int]:
    """Coefficients in the layout of the SO(2) convolutions, as indices l^2 + l + m."""
    return [l * l + l + m for l, m in OrderLayout(lmax, mmax).rows()]

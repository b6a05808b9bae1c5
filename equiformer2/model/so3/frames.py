"""Edge frames and the Wigner-D matrices that rotate irreps into them.

Convention (e3nn): y is the polar axis, components of degree l are ordered m = -l..l. The frame of an edge is
a rotation that takes the direction of the edge to +y (paper section 3.2: in this frame an SO(3) convolution
becomes an SO(2) convolution). The remaining angle about the edge is free; the reference implementation draws
it at random, here it is a fixed function of the direction, so equal input gives equal bits.
"""

import dataclasses
import functools

import torch
from e3nn import o3
from torch import Tensor

from equiformer2.kernels import pack_blocks
from equiformer2.kernels.chunks import no_autocast

# Directions closer to the polar axis than this (sine of the angle) use a second chart whose polar axis is x:
# in either chart the frame is a smooth function of the direction, with bounded derivatives.
_POLAR_SINE = 0.5


@dataclasses.dataclass(frozen=True)
class EdgeFrames:
    """Wigner-D matrices of E edges.

    Attributes:
        entries: `[E, P + 1]`, the blocks side by side and a zero, as the kernels take them
            (`kernels.rotation`).
        lmax: highest degree.
        mmax: highest order of the rows.
    """

    entries: Tensor
    lmax: int
    mmax: int

    @classmethod
    def from_blocks(cls, blocks: list[Tensor], mmax: int) -> "EdgeFrames":
        """Frames given as `blocks`, for l = 0..lmax."""
        return cls(pack_blocks(blocks), len(blocks) - 1, mmax)

    @classmethod
    def from_vectors(cls, vectors: Tensor, distances: Tensor, lmax: int, mmax: int) -> "EdgeFrames":
        """Deterministic frames of edge vectors `[E, 3]` (Å) with lengths `[E]`, differentiable in both."""
        direction = vectors / distances.unsqueeze(1)
        x, y, z = direction.unbind(1)
        polar = x * x + z * z < _POLAR_SINE**2
        # Cyclic permutation (x, y, z) -> (z, x, y) is a proper rotation that moves the polar axis away.
        x, y, z = torch.where(polar, z, x), torch.where(polar, x, y), torch.where(polar, y, z)
        sin_beta = torch.sqrt(x * x + z * z)
        cosines, sines = torch.stack((y, z / sin_beta)), torch.stack((sin_beta, x / sin_beta))
        return cls(_wigner_entries(cosines, sines, lmax, mmax, polar), lmax, mmax)

    @classmethod
    def from_rotations(cls, rotations: Tensor, lmax: int, mmax: int) -> "EdgeFrames":
        """Frames given as rotation matrices `[E, 3, 3]` that take each edge direction to +y."""
        # rotation = Ry(gauge) Rx(-beta) Ry(-alpha): its middle row is the direction of the edge.
        x, y, z = rotations[:, 1].unbind(1)
        sin_beta = torch.sqrt(x * x + z * z)
        pole = sin_beta < 1e-12
        safe = torch.where(pole, torch.ones_like(sin_beta), sin_beta)
        cos_alpha = torch.where(pole, torch.ones_like(z), z / safe)
        sin_alpha = torch.where(pole, torch.zeros_like(x), x / safe)
        # Column image of the direction at (beta + 90°, alpha) is z in the frame without gauge.
        tilted = torch.stack((y * sin_alpha, -sin_beta, y * cos_alpha), dim=1)
        with no_autocast(rotations):
            image = (rotations @ tilted.unsqueeze(2)).squeeze(2)
        cosines, sines = torch.stack((y, cos_alpha)), torch.stack((sin_beta, sin_alpha))
        entries = _wigner_entries(cosines, sines, lmax, mmax, torch.zeros_like(pole))
        gauge = _multiples(image[:, 2], image[:, 0], lmax)
        blocks = [_turn_rows(block, *gauge) for block in cls(entries, lmax, mmax).blocks]
        return cls.from_blocks(blocks, mmax)

    @property
    def blocks(self) -> list[Tensor]:
        """For l = 0..lmax `[E, min(2l, 2 mmax) + 1, 2l + 1]`; rows m = 0, +1, -1, +2, -2, … up to mmax."""
        shapes = [(2 * min(l, self.mmax) + 1, 2 * l + 1) for l in range(self.lmax + 1)]
        parts = self.entries[:, :-1].split([rows * columns for rows, columns in shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _wigner_entries(cosines: Tensor, sines: Tensor, lmax: int, mmax: int, permuted: Tensor) -> Tensor:
    """Rows |m| <= mmax of D(Rx(-beta) Ry(-alpha)) for l = 0..lmax and a zero, `[E, P + 1]`.

    A rotation about x is a rotation about y between two constant rotations, so every entry is a linear
    combination of products of cos(m angle) and sin(m angle) of both angles: one GEMM makes all of them, and
    no trigonometric function is evaluated.

    Args:
        cosines: `[2, E]` of beta and alpha; sines: the same.
        permuted: `[E]`, edges for which the rotation acts on cyclically permuted axes.
    """
    cosines, sines = _multiples(cosines, sines, lmax)
    multiples = torch.cat((cosines, sines[..., 1:]), dim=2)
    beta = torch.stack((~permuted, permuted), dim=1).unsqueeze(2) * multiples[0].unsqueeze(1)
    products = beta.unsqueeze(3) * multiples[1][:, None, None]
    # Matrices rounded to bf16 would be no rotations: everything behind them would lose its symmetry.
    with no_autocast(products):
        return products.flatten(1) @ _entry_map(lmax, mmax, products.dtype, products.device)


def _multiples(cos: Tensor, sin: Tensor, lmax: int) -> tuple[Tensor, Tensor]:
    """cos(m angle) and sin(m angle) for m = 0..lmax: two `[..., lmax+1]`."""
    cosines, sines = [torch.ones_like(cos)], [torch.zeros_like(sin)]
    for _ in range(lmax):
        cosines, sines = (
            [*cosines, cosines[-1] * cos - sines[-1] * sin],
            [*sines, sines[-1] * cos + cosines[-1] * sin],
        )
    return torch.stack(cosines, dim=-1), torch.stack(sines, dim=-1)


def _turn_rows(block: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """D(Ry(angle)) @ block, from cos(m angle) and sin(m angle) `[E, lmax+1]`.

    D(Ry(angle))[m, m] = cos(m angle) and D(Ry(angle))[m, -m] = -sin(m angle) (e3nn).
    """
    orders = (block.shape[1] - 1) // 2
    turned = [block[:, :1]]
    for m in range(1, orders + 1):
        plus, minus = block[:, 2 * m - 1 : 2 * m], block[:, 2 * m : 2 * m + 1]
        c, s = cos[:, m, None, None], sin[:, m, None, None]
        turned += [c * plus - s * minus, c * minus + s * plus]
    return torch.cat(turned, dim=1)


@functools.cache
def _entry_map(lmax: int, mmax: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Coefficients of the entries in products of cosines and sines, `[2 (2 lmax + 1)^2, P + 1]`.

    Rows: axes as they are or permuted; then for beta, and within it for alpha, cos(m angle) for m = 0..lmax
    and sin(m angle) for m = 1..lmax. On the device, once: a copy to a GPU waits for it, and CUDA graphs can
    hold none.
    """
    # Made in inference mode, it would be of no use to a later derivative.
    with torch.inference_mode(False):
        columns = []
        for l in range(lmax + 1):
            rows = [l] + [l + sign * m for m in range(1, min(l, mmax) + 1) for sign in (1, -1)]
            to_x, cycle = _constant_rotations(l)
            turns = _turns_back(l, lmax)
            about_x = to_x[rows] @ turns @ to_x.t()
            entries = torch.einsum("brk,akc->barc", about_x, turns)
            columns.append(torch.stack((entries, entries @ cycle)).flatten(0, 2).flatten(1))
        columns.append(columns[0].new_zeros(len(columns[0]), 1))
        return torch.cat(columns, dim=1).to(device, dtype)


def _turns_back(l: int, lmax: int) -> Tensor:
    """D^l(Ry(-angle)) as coefficients of its cosines and sines, `[2 lmax + 1, 2l + 1, 2l + 1]`, float64."""
    turns = torch.zeros(2 * lmax + 1, 2 * l + 1, 2 * l + 1, dtype=torch.float64)
    turns[0, l, l] = 1
    for m in range(1, l + 1):
        turns[m, l + m, l + m] = turns[m, l - m, l - m] = 1
        turns[lmax + m, l + m, l - m], turns[lmax + m, l - m, l + m] = 1, -1
    return turns


@functools.cache
def _constant_rotations(l: int) -> tuple[Tensor, Tensor]:
    """D^l of the rotation Q with Q Ry(t) Q^-1 = Rx(t), and of the cyclic permutation of the axes, float64."""
    # Q takes y to x: a quarter turn about -z.
    quarter_turn = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    # (x, y, z) -> (z, x, y)
    cycle = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    about_x, about_y = _generators(l)
    matrices = []
    for rotation in (quarter_turn, cycle):
        alpha, beta, gamma = o3.matrix_to_angles(rotation)
        left, middle, right = alpha * about_y, beta * about_x, gamma * about_y
        matrices.append(torch.matrix_exp(left) @ torch.matrix_exp(middle) @ torch.matrix_exp(right))
    return matrices[0], matrices[1]


def _generators(l: int) -> tuple[Tensor, Tensor]:
    """Generators of rotations about x and y on the real spherical harmonics of degree l, in float64.

    e3nn has the same matrices, but rounds them to the default precision.
    """
    size = 2 * l + 1
    order = torch.arange(-l, l, dtype=torch.float64)
    ladder = torch.diag(torch.sqrt(l * (l + 1) - order * (order + 1)), diagonal=1).to(torch.complex128)
    about_x = 0.5 * (ladder - ladder.mH)
    about_y = torch.diag(1j * torch.arange(-l, l + 1, dtype=torch.float64))
    # Complex harmonics of order m in terms of the real ones of orders m and -m.
    real, imaginary = torch.zeros(2, size, size, dtype=torch.float64)
    for m in range(1, l + 1):
        sign = (-1) ** m
        real[l - m, l + m], imaginary[l - m, l - m] = 2**-0.5, -(2**-0.5)
        real[l + m, l + m], imaginary[l + m, l - m] = sign * 2**-0.5, sign * 2**-0.5
    real[l, l] = 1
    basis = torch.complex(real, imaginary)
    return (basis.mH @ about_x @ basis).real, (basis.mH @ about_y @ basis).real

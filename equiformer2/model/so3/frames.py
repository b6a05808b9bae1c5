"""Edge frames and the Wigner-D matrices that rotate irreps into them.

Convention (e3nn): y is the polar axis, components of degree l are ordered m = -l..l. The frame of an edge is
a rotation that takes the direction of the edge to +y (paper section 3.2: in this frame an SO(3) convolution
becomes an SO(2) convolution). The remaining angle about the edge is free; the reference implementation draws
it at random, here it is a fixed function of the direction, so equal input gives equal bits.
"""

import dataclasses
import functools
from typing import NamedTuple

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
        blocks: for l = 0..lmax `[E, min(2l, 2 mmax) + 1, 2l + 1]`; rows m = 0, +1, -1, +2, -2, … up to mmax.
    """

    blocks: list[Tensor]

    @classmethod
    def from_vectors(cls, vectors: Tensor, distances: Tensor, lmax: int, mmax: int) -> "EdgeFrames":
        """Deterministic frames of edge vectors `[E, 3]` (Å) with lengths `[E]`, differentiable in both."""
        direction = vectors / distances.unsqueeze(1)
        x, y, z = direction.unbind(1)
        polar = x * x + z * z < _POLAR_SINE**2
        # Cyclic permutation (x, y, z) -> (z, x, y) is a proper rotation that moves the polar axis away.
        x, y, z = torch.where(polar, z, x), torch.where(polar, x, y), torch.where(polar, y, z)
        sin_beta = torch.sqrt(x * x + z * z)
        cos_alpha, sin_alpha = z / sin_beta, x / sin_beta
        one, zero = torch.ones_like(y), torch.zeros_like(y)
        return cls(_wigner_blocks((one, zero), (y, sin_beta), (cos_alpha, sin_alpha), lmax, mmax, polar))

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
        gauge = (image[:, 2], image[:, 0])
        return cls(_wigner_blocks(gauge, (y, sin_beta), (cos_alpha, sin_alpha), lmax, mmax, None))

    def packed(self) -> Tensor:
        """The entries of all blocks side by side, as the kernels take them (`kernels.rotation`)."""
        return pack_blocks(self.blocks)

    @property
    def requires_grad(self) -> bool:
        return any(block.requires_grad for block in self.blocks)


def _wigner_blocks(
    gauge: tuple[Tensor, Tensor],
    beta: tuple[Tensor, Tensor],
    alpha: tuple[Tensor, Tensor],
    lmax: int,
    mmax: int,
    permuted: Tensor | None,
) -> list[Tensor]:
    """Rows |m| <= mmax of D(Ry(gauge) Rx(-beta) Ry(-alpha)), angles given as (cosine, sine) `[E]`.

    A rotation about x is a rotation about y between two constant rotations Q, so every angle enters only
    through cos(m angle) and sin(m angle), and no trigonometric function is evaluated. For edges where
    `permuted` is set the rotation acts on cyclically permuted axes.
    """
    gauge_cos, gauge_sin = _multiples(*gauge, lmax)
    beta_cos, beta_sin = _multiples(*beta, lmax)
    alpha_cos, alpha_sin = _multiples(*alpha, lmax)
    blocks = []
    # Matrices rounded to bf16 would be no rotations: everything behind them would lose its symmetry.
    with no_autocast(beta[0]):
        for l in range(lmax + 1):
            constants = _constants(l, mmax, beta[0].dtype, beta[0].device)
            # Z(gauge) mixes only the rows +m and -m, so the cut to |m| <= mmax can be made in front of it.
            left = constants.to_x_rows.expand(len(beta[0]), -1, -1)
            left = _rotate_rows(left, gauge_cos, gauge_sin, constants)
            left = _rotate_columns(left, beta_cos, -beta_sin, l)
            block = _rotate_columns(left @ constants.from_x, alpha_cos, -alpha_sin, l)
            if permuted is not None:
                block = torch.where(permuted[:, None, None], block @ constants.cycle, block)
            blocks.append(block)
    return blocks


def _multiples(cos: Tensor, sin: Tensor, lmax: int) -> tuple[Tensor, Tensor]:
    """cos(m angle) and sin(m angle) for m = 0..lmax: two `[E, lmax+1]`."""
    cosines, sines = [torch.ones_like(cos)], [torch.zeros_like(sin)]
    for _ in range(lmax):
        cosines, sines = (
            [*cosines, cosines[-1] * cos - sines[-1] * sin],
            [*sines, sines[-1] * cos + cosines[-1] * sin],
        )
    return torch.stack(cosines, dim=1), torch.stack(sines, dim=1)


def _signed(cos: Tensor, sin: Tensor, l: int) -> tuple[Tensor, Tensor]:
    """cos(m angle) and sin(m angle) for m = -l..l as `[E, 1, 2l+1]`."""
    cos, sin = cos[:, : l + 1], sin[:, : l + 1]
    return (
        torch.cat((cos[:, 1:].flip(1), cos), dim=1).unsqueeze(1),
        torch.cat((-sin[:, 1:].flip(1), sin), dim=1).unsqueeze(1),
    )


def _rotate_columns(matrix: Tensor, cos: Tensor, sin: Tensor, l: int) -> Tensor:
    """matrix @ Z(angle), with Z = D(Ry(angle)): cos(m angle) on the diagonal, sin on the anti-diagonal.

    Z[m, m] = cos(m angle) and Z[m, -m] = -sin(m angle) = Z(angle)[-m, m] with the sign of m (e3nn).
    """
    cos, sin = _signed(cos, sin, l)
    return matrix * cos + (matrix * -sin).flip(2)


def _rotate_rows(matrix: Tensor, cos: Tensor, sin: Tensor, constants: "_Constants") -> Tensor:
    """Z(angle)[rows] @ matrix, for a matrix that has only `rows` (closed under m -> -m)."""
    cos, sin = _signed(cos, sin, (constants.from_x.shape[0] - 1) // 2)
    cos, sin = cos[:, :, constants.rows].transpose(1, 2), sin[:, :, constants.rows].transpose(1, 2)
    return matrix * cos + matrix[:, constants.partner] * -sin


class _Constants(NamedTuple):
    """What the blocks of one degree are made with.

    Attributes:
        to_x_rows: `[rows, 2l+1]` kept rows of D(Q).
        from_x: `[2l+1, 2l+1]` D(Q) transposed.
        cycle: `[2l+1, 2l+1]` D of the cyclic permutation of the axes.
        rows: kept rows, m = 0, +1, -1, …; partner: where among them is the row of -m.
    """

    to_x_rows: Tensor
    from_x: Tensor
    cycle: Tensor
    rows: Tensor
    partner: Tensor


@functools.cache
def _constants(l: int, mmax: int, dtype: torch.dtype, device: torch.device) -> _Constants:
    """On the device, once: a copy to a GPU waits for it, and CUDA graphs cannot hold one."""
    rows = [l] + [l + sign * m for m in range(1, min(l, mmax) + 1) for sign in (1, -1)]
    partner = [rows.index(2 * l - row) for row in rows]
    # Made in inference mode, they would be of no use to a later derivative.
    with torch.inference_mode(False):
        to_x, cycle = (t.to(device, dtype) for t in _constant_rotations(l))
        indices = [torch.tensor(each, device=device) for each in (rows, partner)]
        return _Constants(to_x[rows], to_x.t(), cycle, *indices)


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

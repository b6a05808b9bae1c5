"""Normalization of irreps (paper section 4.4). All statistics are computed in float32 or wider."""

import torch
from torch import Tensor, nn

from equiformer2.kernels.chunks import no_autocast
from equiformer2.kernels.rows import gather_rows
from equiformer2.model.folding import read
from equiformer2.model.so3 import DerivedConstants

_EPS = 1e-5


def make_norm(norm_type: str, lmax: int, num_channels: int) -> nn.Module:
    """Make the norm of that name, on `[N, (lmax+1)^2, num_channels]`."""
    return {"layer_norm": LayerNorm, "layer_norm_sh": SeparableLayerNorm, "rms_norm_sh": RMSNorm}[norm_type](
        lmax, num_channels
    )


class _DegreeNorm(DerivedConstants):
    """Index of the degree of every coefficient, and weights that average over orders, then degrees."""

    degree: Tensor
    balance: Tensor

    def __init__(self, lmax: int, first_degree: int) -> None:
        super().__init__()
        degrees = torch.tensor([l for l in range(first_degree, lmax + 1) for _ in range(2 * l + 1)])
        self.register_buffer("degree", degrees - first_degree, persistent=False)
        self.add_constant("balance", 1.0 / ((2 * degrees.double() + 1) * (lmax + 1 - first_degree)))

    def balanced_scale(self, x: Tensor) -> Tensor:
        """Compute 1 / root mean square `[N, 1, 1]` over channels and degrees, which count equally."""
        square = torch.einsum("nkc,k->n", x * x, self.balance) / x.shape[2]
        return torch.rsqrt(square + _EPS)[:, None, None]


class SeparableLayerNorm(_DegreeNorm):
    """Layer norm of the scalars, one common root mean square for all l > 0 (paper section 4.4)."""

    def __init__(self, lmax: int, num_channels: int) -> None:
        super().__init__(lmax, first_degree=1)
        self.norm_l0 = nn.LayerNorm(num_channels, eps=_EPS)
        self.affine_weight = nn.Parameter(torch.ones(lmax, num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise features `[N, K, C]`."""
        with no_autocast(x):
            tensors = x[:, 1:]
            weight = gather_rows(read(self, "affine_weight"), self.degree)
            scaled = tensors * (self.balanced_scale(tensors) * weight)
            return torch.cat((self.norm_l0(x[:, :1]), scaled), dim=1)


class RMSNorm(_DegreeNorm):
    """One common root mean square for all degrees, scalars centred first."""

    def __init__(self, lmax: int, num_channels: int) -> None:
        super().__init__(lmax, first_degree=0)
        self.affine_weight = nn.Parameter(torch.ones(lmax + 1, num_channels))
        self.affine_bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise features `[N, K, C]`."""
        with no_autocast(x):
            scalars = x[:, :1]
            x = torch.cat((scalars - scalars.mean(dim=2, keepdim=True), x[:, 1:]), dim=1)
            x = x * (self.balanced_scale(x) * gather_rows(read(self, "affine_weight"), self.degree))
            return torch.cat((x[:, :1] + read(self, "affine_bias"), x[:, 1:]), dim=1)


class LayerNorm(nn.Module):
    """Every degree by its own root mean square, scalars centred first (Equiformer's layer norm)."""

    def __init__(self, lmax: int, num_channels: int) -> None:
        super().__init__()
        self.affine_weight = nn.Parameter(torch.ones(lmax + 1, num_channels))
        self.affine_bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise features `[N, K, C]`."""
        with no_autocast(x):
            out = []
            for l, weight in enumerate(read(self, "affine_weight")):
                part = x[:, l * l : (l + 1) ** 2]
                if l == 0:
                    part = part - part.mean(dim=2, keepdim=True)
                part = part * (torch.rsqrt(part.pow(2).mean((1, 2), keepdim=True) + _EPS) * weight)
                out.append(part + read(self, "affine_bias") if l == 0 else part)
            return torch.cat(out, dim=1)

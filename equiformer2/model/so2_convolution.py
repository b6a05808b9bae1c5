"""SO(2) convolution: the linear maps of an SO(3) convolution in the edge frame (paper section 3.2)."""

import math

import torch
from torch import nn

from equiformer2.kernels import SO2Weights
from equiformer2.kernels.so2 import Folded
from equiformer2.model.folding import Folding
from equiformer2.model.radial import RadialFunction


class SO2MConvolution(nn.Module):
    """Weights of one order m > 0: `fc.weight [2 out, in]`, real part then imaginary part."""

    def __init__(self, num_degrees: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(num_degrees * in_channels, 2 * num_degrees * out_channels, bias=False)
        # Two products are added in every output.
        self.fc.weight.data.mul_(1 / math.sqrt(2))


class SO2Convolution(Folding):
    """Weights of all orders of an SO(2) convolution.

    Args:
        in_channels, out_channels: per coefficient.
        lmax, mmax: degrees and orders.
        extra_m0_channels: further scalar outputs of the m = 0 map, in front of the coefficients (attention
            vector and gates).
        radial_inputs, radial_hidden: sizes of a radial function of its own, or None to have none.
    """

    _folded: Folded | None
    _folded_vectors: Folded | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        lmax: int,
        mmax: int,
        extra_m0_channels: int = 0,
        radial_inputs: int | None = None,
        radial_hidden: int = 0,
    ) -> None:
        super().__init__()
        self.lmax, self.mmax = lmax, mmax
        self.in_channels, self.out_channels = in_channels, out_channels
        self.extra_m0_channels = extra_m0_channels
        degrees = [lmax + 1 - m for m in range(mmax + 1)]
        self.fc_m0 = nn.Linear(degrees[0] * in_channels, degrees[0] * out_channels + extra_m0_channels)
        self.so2_m_conv = nn.ModuleList(SO2MConvolution(n, in_channels, out_channels) for n in degrees[1:])
        self.rad_func: RadialFunction | None = None
        if radial_inputs is not None:
            self.rad_func = RadialFunction(radial_inputs, radial_hidden, sum(degrees) * in_channels)

    def weights(self) -> SO2Weights:
        """Those of all orders."""
        orders = tuple(conv.fc.weight for conv in self.so2_m_conv)  # type: ignore[union-attr,misc]
        return SO2Weights(self.fc_m0.weight, self.fc_m0.bias, orders, self._folded)  # type: ignore[arg-type]

    def fold(self, dtype: torch.dtype | None, packed: bool) -> None:
        """Compute the matrices of the GEMMs once."""
        self._folded = self.weights().fold(dtype or self.fc_m0.weight.dtype, packed)
        self._folded_vectors = None

    def unfold(self) -> None:
        """Forget them."""
        self._folded = self._folded_vectors = None

    def weights_of_vectors(self) -> SO2Weights:
        """Those that the coefficients of degrees 0 and 1 come from; the force head reads nothing else."""
        wide, one = 2 * self.out_channels, self.out_channels
        orders = self.weights().orders[:1]
        first = tuple(weight.unflatten(0, (2, -1))[:, :one].flatten(0, 1) for weight in orders)
        weights = SO2Weights(self.fc_m0.weight[:wide], self.fc_m0.bias[:wide], first)
        if self._folded is not None and self._folded_vectors is None:
            self._folded_vectors = weights.fold(self._folded.terms[0].dtype, self._folded.packed)
        return weights._replace(folded=self._folded_vectors)

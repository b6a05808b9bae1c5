"""SO(2) convolution: the linear maps of an SO(3) convolution in the edge frame (paper section 3.2)."""

import math

from torch import nn

from equiformer2.kernels import SO2Weights
from equiformer2.model.folding import Folding, Layout, read
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
        """Read the weights of all orders."""
        return self.folded() or self._read("all")  # type: ignore[no-any-return]

    def weights_of_vectors(self) -> SO2Weights:
        """Read the weights that degrees 0 and 1 come from; the force head uses nothing else."""
        return self.folded("vectors") or self._read("vectors")  # type: ignore[no-any-return]

    def prepare(self, form: str, layout: Layout) -> SO2Weights:
        """Compute the matrices of the GEMMs."""
        weights = self._read(form)
        return weights._replace(
            folded=tuple(layout.matrix(term) for term in weights.terms(weights.bias.dtype))
        )

    def _read(self, form: str) -> SO2Weights:
        scalar, bias = read(self.fc_m0), read(self.fc_m0, "bias")
        if form == "all":
            return SO2Weights(scalar, bias, tuple(read(conv.fc) for conv in self.so2_m_conv))  # type: ignore[arg-type]
        wide, one = 2 * self.out_channels, self.out_channels
        orders = tuple(read(conv.fc) for conv in self.so2_m_conv[:1])  # type: ignore[arg-type]
        first = tuple(weight.unflatten(0, (2, -1))[:, :one].flatten(0, 1) for weight in orders)
        return SO2Weights(scalar[:wide], bias[:wide], first)

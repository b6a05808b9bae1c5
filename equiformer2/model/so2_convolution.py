"""SO(2) convolution: the linear maps of an SO(3) convolution in the edge frame (paper section 3.2)."""

import math

import torch
from torch import Tensor, nn

from equiformer2.kernels import complex_linear, convolve_edges
from equiformer2.kernels.rotation import m_major_starts
from equiformer2.model.radial import RadialFunction
from equiformer2.model.so3 import EdgeFrames


class SO2MConvolution(nn.Module):
    """Weights of one order m > 0: `fc.weight [2 out, in]`, real part then imaginary part."""

    def __init__(self, num_degrees: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(num_degrees * in_channels, 2 * num_degrees * out_channels, bias=False)
        # Two products are added in every output.
        self.fc.weight.data.mul_(1 / math.sqrt(2))


class SO2Convolution(nn.Module):
    """Weights of all orders of an SO(2) convolution and their application to m-major features.

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

    def weights(self) -> list[Tensor]:
        """One matrix per order, see `kernels.convolve_edges`."""
        orders = (conv.fc for conv in self.so2_m_conv)
        return [layer.weight for layer in (self.fc_m0, *orders)]  # type: ignore[union-attr,misc]

    def convolve(
        self,
        x: Tensor,
        frames: EdgeFrames,
        edge_index: Tensor,
        hidden: Tensor,
        radial: nn.Linear,
        shared_orders: bool,
    ) -> tuple[Tensor, Tensor]:
        """Convolve the features of both atoms of every edge with radial weights.

        Returns:
            `[E, extra_m0_channels]` scalars and m-major features `[E, R, out_channels]` in the edge frames.
        """
        outputs = convolve_edges(
            x,
            frames.blocks,
            edge_index[0],
            edge_index[1],
            hidden,
            radial.weight,
            radial.bias,
            self.weights(),
            shared_orders,
        )
        scalars = outputs[0] + self.fc_m0.bias.to(outputs[0].dtype)
        extra, scalars = scalars[:, : self.extra_m0_channels], scalars[:, self.extra_m0_channels :]
        return extra, self._stack([scalars, *outputs[1:]])

    def forward(self, x: Tensor) -> Tensor:
        """m-major `[E, R, in_channels]` to `[E, R, out_channels]`, without radial weights."""
        scalars, pairs = self._orders(x)
        outputs = [nn.functional.linear(scalars, self.fc_m0.weight, self.fc_m0.bias)]
        for pair, weight in zip(pairs, self.weights()[1:], strict=True):
            outputs.append(complex_linear(*pair, weight))
        return self._stack(outputs)

    def first_degrees(self, x: Tensor) -> Tensor:
        """As `forward`, but only degrees 0 and 1: m-major `[E, 4, out_channels]` (2 rows if mmax = 0).

        The force head reads nothing else; inputs of orders |m| > 1 do not reach these outputs.
        """
        wide = 2 * self.out_channels
        scalars, pairs = self._orders(x)
        outputs = [nn.functional.linear(scalars, self.fc_m0.weight[:wide], self.fc_m0.bias[:wide])]
        if self.mmax > 0:
            weight = self.weights()[1].unflatten(0, (2, -1))[:, : self.out_channels].flatten(0, 1)
            outputs.append(complex_linear(*pairs[0], weight))
        return self._stack(outputs)

    def _orders(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Flattened coefficients of m = 0, and those of (+m, -m) for the orders m >= 1 that `x` has."""
        starts = m_major_starts(self.lmax, self.mmax)
        pairs = []
        for m in range(1, self.mmax + 1):
            if starts[m + 1] <= x.shape[1]:
                positive, negative = x[:, starts[m] : starts[m + 1]].chunk(2, dim=1)
                pairs.append((positive.flatten(1), negative.flatten(1)))
        return x[:, : starts[1]].flatten(1), pairs

    def _stack(self, outputs: list[Tensor]) -> Tensor:
        return torch.cat(outputs, dim=1).unflatten(1, (-1, self.out_channels))

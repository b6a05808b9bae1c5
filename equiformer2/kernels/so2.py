"""The linear maps of an SO(2) convolution: one GEMM for m = 0, three for every m > 0 (Gauss)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equiformer2.kernels.chunks import cast_to_autocast
from equiformer2.kernels.linear import linear


class SO2Weights(NamedTuple):
    """Weights of all orders.

    Attributes:
        scalar: `[out_0, (L+1) C]`, order m = 0.
        bias: `[out_0]`.
        orders: for every m >= 1 `[2 out_m, (L+1-m) C]`: W_r above W_i (paper Equation 2).
        folded: `terms` that have been computed before, perhaps packed (`linear.pack`); without gradients.
    """

    scalar: Tensor
    bias: Tensor
    orders: tuple[Tensor, ...]
    folded: tuple[Tensor, ...] | None = None

    @classmethod
    def from_flat(cls, flat: Sequence[Tensor]) -> "SO2Weights":
        """Make them of `(scalar, bias, *orders)`, which is how they go through autograd functions."""
        return cls(flat[0], flat[1], tuple(flat[2:]))

    @property
    def flat(self) -> tuple[Tensor, ...]:
        """`(scalar, bias, *orders)`."""
        return (self.scalar, self.bias, *self.orders)

    def terms(self, dtype: torch.dtype) -> list[Tensor]:
        """Compute the matrices of the GEMMs: m = 0, then `gauss_terms` of the others, rounded at the end."""
        if self.folded is not None and self.folded[0].dtype == dtype:
            return list(self.folded)
        orders = (term.to(dtype) for weight in self.orders for term in self.gauss_terms(weight))
        return [self.scalar.to(dtype), *orders]

    @staticmethod
    def gauss_terms(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute W_r, W_i - W_r and W_r + W_i, each `[out, in]`, of `weight [2 out, in]` (W_r above W_i)."""
        real, imaginary = weight.unflatten(0, (2, -1))
        return real, imaginary - real, real + imaginary

    def gemm_dtype(self, x: Tensor) -> torch.dtype:
        """Precision of the GEMMs with `x`: autocast's where it is on, else that of the weights."""
        return cast_to_autocast(x, self.bias)[1].dtype

    @staticmethod
    def gradients(grad_terms: Sequence[Tensor]) -> list[Tensor]:
        """Compute the gradients of `(scalar, *orders)` from those of `terms`."""
        orders = [
            torch.cat((first - second + third, second + third))
            for first, second, third in zip(grad_terms[1::3], grad_terms[2::3], grad_terms[3::3], strict=True)
        ]
        return [grad_terms[0], *orders]


def gauss_triple(positive: Tensor, negative: Tensor) -> list[Tensor]:
    """Make the three GEMM inputs of an order m > 0: the sum of the coefficients of +m and -m, and both.

    "GEMM inputs" are one tensor `[E, n]` for m = 0, then three for every other order; multiplied by
    `SO2Weights.terms` they give the "products" k1, k2 and k3 of `complex_linear`.
    """
    return [positive + negative, positive, negative]


def gauss_inputs(x: Tensor, lmax: int, mmax: int) -> list[Tensor]:
    """Cut the GEMM inputs of orders 0 … mmax out of m-major `x [E, R, C]` (see `gauss_triple`)."""
    start = lmax + 1
    inputs = [x[:, :start].flatten(1)]
    for m in range(1, mmax + 1):
        degrees = lmax + 1 - m
        pair = x[:, start : start + 2 * degrees].flatten(1)
        start += 2 * degrees
        inputs += gauss_triple(*pair.chunk(2, dim=1))
    return inputs


def gauss_values(products: Sequence[Tensor], bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Put the outputs of all orders side by side, m-major, from the products of the GEMMs.

    Args:
        products: of m = 0 and three of every other order, each `[E, out_m]`.
        bias: `[out_0]`, or None.
        out: `[E, out_0 + 2 out_1 + …]` that is written to, if not a new tensor.

    Returns:
        `out`.
    """
    pairs = [products[i : i + 3] for i in range(1, len(products), 3)]
    start = products[0].shape[1]
    if out is None:
        columns = start + 2 * sum(common.shape[1] for common, _, _ in pairs)
        out = products[0].new_empty(len(products[0]), columns)
    if bias is None:
        out[:, :start] = products[0]
    else:
        torch.add(products[0], bias, out=out[:, :start])
    for common, plus, minus in pairs:
        width = common.shape[1]
        torch.sub(common, minus, out=out[:, start : start + width])
        torch.add(common, plus, out=out[:, start + width : start + 2 * width])
        start += 2 * width
    return out


def gauss_gradients(grad: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Compute the gradients of the products of orders m > 0 from that of their values.

    Args:
        grad: `[E, 2 out_1 + 2 out_2 + …]`.
        widths: columns of each product, three equal ones for every order.

    Returns:
        One gradient for each width.
    """
    out, start = [], 0
    for width in widths[::3]:
        positive, negative = grad[:, start : start + width], grad[:, start + width : start + 2 * width]
        start += 2 * width
        out += [positive + negative, negative, -positive]
    return out


def products_backward(
    inputs: Sequence[Tensor], grads: Sequence[Tensor], terms: Sequence[Tensor], totals: Sequence[Tensor]
) -> list[Tensor]:
    """Differentiate the GEMMs of some edges.

    Args:
        inputs: `[e, in]` of every GEMM.
        grads: `[e, out]`, gradients of the products.
        terms: `[out, in]`, see `SO2Weights.terms`.
        totals: `[out, in]` sums over edges, to which the gradients of the terms are added.

    Returns:
        The gradients of the inputs.
    """
    for x, grad, total in zip(inputs, grads, totals, strict=True):
        accumulate(total, grad.t(), x)
    return [linear(grad, term.t()) for grad, term in zip(grads, terms, strict=True)]


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, without a temporary where the precisions allow it."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))


def complex_linear(positive: Tensor, negative: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """SO(2) linear map of the coefficients of +m and -m (paper Equation 2).

    out_+m = W_r x_+m - W_i x_-m and out_-m = W_i x_+m + W_r x_-m. With k1 = W_r (x_+m + x_-m),
    k2 = (W_i - W_r) x_+m and k3 = (W_r + W_i) x_-m these are k1 - k3 and k1 + k2.

    Args:
        positive, negative: `[E, in]`.
        terms: `SO2Weights.gauss_terms` of the order.

    Returns:
        `[E, 2 out]`: +m, then -m.
    """
    inputs = gauss_triple(positive, negative)
    common, plus, minus = (linear(x, term) for x, term in zip(inputs, terms, strict=True))
    return torch.cat((common - minus, common + plus), dim=1)


def so2_linear(x: Tensor, terms: Sequence[Tensor], bias: Tensor, lmax: int) -> Tensor:
    """SO(2) linear map of m-major features, without radial weights.

    Args:
        x: `[E, R, C]`. Orders for which there are no terms are not read.
        terms: of orders 0 … M (see `SO2Weights.terms`).
        bias: `[out_0]`.
        lmax: L of `x`.

    Returns:
        `[E, sum of the outputs of all orders]`, m-major.
    """
    start = lmax + 1
    outputs = [linear(x[:, :start].flatten(1), terms[0]) + bias.to(x.dtype)]
    for m in range(1, len(terms) // 3 + 1):
        degrees = lmax + 1 - m
        pair = x[:, start : start + 2 * degrees]
        start += 2 * degrees
        sides = pair[:, :degrees].flatten(1), pair[:, degrees:].flatten(1)
        outputs.append(complex_linear(*sides, terms[3 * m - 2 : 3 * m + 1]))
    return torch.cat(outputs, dim=1)

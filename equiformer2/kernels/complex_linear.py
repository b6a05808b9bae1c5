"""The linear map of order m > 0: a complex product with three real GEMMs instead of four (Gauss)."""

import torch
from torch import Tensor
from torch.nn.functional import linear


def gauss_terms(weight: Tensor) -> Tensor:
    """`weight [2 out, in]` (real part above imaginary part) as `[3, out, in]`: W_r, W_i - W_r, W_r + W_i."""
    real, imaginary = weight.unflatten(0, (2, -1))
    return torch.stack((real, imaginary - real, real + imaginary))


def complex_linear(positive: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
    """SO(2) linear map of the coefficients of +m and -m (paper Equation 2).

    out_+m = W_r x_+m - W_i x_-m and out_-m = W_i x_+m + W_r x_-m. With k1 = W_r (x_+m + x_-m),
    k2 = (W_i - W_r) x_+m and k3 = (W_r + W_i) x_-m these are k1 - k3 and k1 + k2.

    Args:
        positive, negative: `[E, in]`.
        weight: `[2 out, in]`.

    Returns:
        `[E, 2 out]`: +m, then -m.
    """
    first, second, third = gauss_terms(weight)
    common = linear(positive + negative, first)
    return torch.cat((common - linear(negative, third), common + linear(positive, second)), dim=1)

"""Matrix products, with weights as they are and in oneDNN's own layout."""

import pytest
import torch
from torch import Tensor

from equiformer2.kernels.linear import linear, pack

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """False for bfloat16 on CPUs without AVX-512, where `linear` must do without oneDNN."""
    x = torch.zeros(1, 1, dtype=dtype)
    try:
        torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
    except RuntimeError:
        return False
    return True


def operands(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, 24, dtype=dtype), torch.randn(10, 24, dtype=dtype)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 130])
def test_packed_weights_give_the_same_products(rows: int, dtype: torch.dtype) -> None:
    x, weight = operands(rows, dtype)
    packed = pack(weight)
    assert packed.is_mkldnn or not onednn_multiplies(dtype)
    assert (packed.shape, packed.dtype) == (weight.shape, weight.dtype)
    expected = (x.double() @ weight.double().t()).to(dtype)
    with torch.no_grad():
        for answer in (linear(x, packed), linear(x, weight)):
            torch.testing.assert_close(answer, expected)


@needs_onednn
def test_rows_of_something_wider_and_transposed_inputs() -> None:
    x, weight = operands(40, torch.float32)
    wide = torch.cat((x, x + 1), dim=1)
    with torch.no_grad():
        for part in (wide[:, 24:], x.t().contiguous().t()):
            torch.testing.assert_close(linear(part, pack(weight)), part @ weight.t())
            torch.testing.assert_close(linear(part, weight), part @ weight.t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_what_onednn_does_not_take_stays_as_it_is(dtype: torch.dtype) -> None:
    _, weight = operands(1, dtype)
    assert pack(weight) is weight


def test_first_and_second_derivatives() -> None:
    """Gradients of the operator for float32 against those of float64, which goes through torch."""
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        x, weight = (t.to(dtype).requires_grad_() for t in operands(9, torch.float64))
        total = linear(x, weight).sin().sum()
        first = torch.autograd.grad(total, (x, weight), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), (x, weight))
        gradients[dtype] = [*first, *second]
    for ours, exact in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-3)

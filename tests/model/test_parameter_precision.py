"""Which precisions parameters and positions may have, and what comes out of them."""

import pytest
import torch
from model_helpers import batch_of, cluster, loss_of, random_model, slab, small_config
from torch import Tensor

from equiformer2 import EquiformerV2
from equiformer2.errors import InputError
from equiformer2.kernels.backend import BACKEND_NAMES
from equiformer2.kernels.cpu import library

backends = pytest.mark.parametrize("backend", ["torch", "cpp"])


def trained(model: EquiformerV2, backend: str, positions: torch.dtype) -> dict[str, Tensor]:
    """Outputs of a training pass and the gradients of all parameters."""
    if backend == "cpp" and library.Compiler.find() is None:
        pytest.skip(library.NO_COMPILER)
    model.backend = backend
    out = model.train()(batch_of(slab(positions), cluster(positions)))
    model.zero_grad()
    loss_of(out).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) > len(out)
    return {name: value.detach() for name, value in (out | grads).items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@backends
@pytest.mark.parametrize("mmax", [1, 2])
def test_float64_parameters(backend: str, mmax: int) -> None:
    """Everything after the edge vectors is in float64: both backends agree far beyond float32."""
    model = random_model(small_config(mmax=mmax), torch.float64)
    found = trained(model, backend, torch.float64)
    assert {value.dtype for value in found.values()} == {torch.float64}
    assert_close(found, trained(model, "torch", torch.float64), 1e-11)
    assert_close(trained(model, backend, torch.float32), found, 2e-5)


@backends
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64], ids=str)
def test_positions_in_bfloat16_are_rounded_once(backend: str, parameters: torch.dtype) -> None:
    """Stored in bf16 they are less precise; edge vectors are their differences in float32 all the same."""
    model = random_model(small_config(mmax=2), parameters)
    found = trained(model, backend, torch.bfloat16)
    batch = batch_of(slab(torch.bfloat16), cluster(torch.bfloat16))
    batch.pos, batch.cell = batch.pos.float(), batch.cell.float()
    expected = model(batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_parameters_in_half_precision_are_refused(backend: str, dtype: torch.dtype) -> None:
    model = EquiformerV2(small_config()).to(dtype)
    model.backend = backend
    name = str(dtype).removeprefix("torch.")
    for call in (model.check_backend, lambda: model(batch_of(cluster()))):
        with pytest.raises(InputError, match=f"the parameters are {name}, .*torch.autocast"):
            call()


def test_half_precision_is_refused_with_gradient_forces() -> None:
    model = EquiformerV2(small_config(forces="gradient")).to(torch.bfloat16)
    with pytest.raises(InputError, match="the parameters are bfloat16"):
        model(batch_of(cluster()))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_products_alone(backend: str, dtype: torch.dtype) -> None:
    """What the message recommends: gradients in the precision of the parameters, near those of float32."""
    model = random_model(small_config(mmax=2))
    expected = trained(model, "torch", torch.float32)
    with torch.autocast("cpu", dtype):
        found = trained(model, backend, torch.float32)
    assert {value.dtype for value in found.values()} == {torch.float32}
    errors = [float((found[name] - value).norm() / value.norm()) for name, value in expected.items()]
    assert sorted(errors)[len(errors) // 2] < 0.03
    assert max(errors) < 0.2

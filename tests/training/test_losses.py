"""The S2EF losses average over the global batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equiformer2.training.losses import energy_l1, force_l2, stress_l1


def test_energy_l1_is_the_mean_absolute_error() -> None:
    assert energy_l1(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])).item() == 2.0


def test_energies_that_are_not_known_do_not_count() -> None:
    prediction = torch.tensor([1.0, -2.0, 50.0], requires_grad=True)
    known = torch.tensor([True, True, False])
    loss = energy_l1(prediction, torch.tensor([0.0, 1.0, 0.0]), known)
    loss.backward()
    assert loss.item() == 2.0
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [0.5, -0.5, 0.0]
    assert energy_l1(prediction, torch.zeros(3), torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_force_l2_is_the_mean_norm_over_free_atoms() -> None:
    target = torch.zeros(3, 3)
    prediction = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0], [100.0, 0.0, 0.0]])
    free = torch.tensor([True, True, False])
    assert force_l2(prediction, target, free).item() == 3.0


def test_no_free_atoms_gives_zero_with_zero_gradient() -> None:
    prediction = torch.ones(2, 3, requires_grad=True)
    loss = force_l2(prediction, torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(prediction.grad, torch.zeros(2, 3))


def test_bfloat16_outputs_are_compared_in_float32() -> None:
    target = torch.full((4,), 1.0 + 2.0**-12)
    assert energy_l1(torch.ones(4, dtype=torch.bfloat16), target).item() == 2.0**-12


@pytest.mark.parametrize("loss", [energy_l1, force_l2, stress_l1])
def test_in_float64_accumulated_gradients_are_those_of_the_batch(loss: Callable[..., Tensor]) -> None:
    shape = {energy_l1: (5,), force_l2: (5, 3), stress_l1: (5, 3, 3)}[loss]
    prediction = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target, counted = torch.randn(shape), torch.ones(5, dtype=torch.bool)
    (whole,) = torch.autograd.grad(loss(prediction, target, counted), prediction)
    # In float32 a third of the inverse of 5 / 3 is not that of 5.
    parts = [loss(prediction[i : i + 2], target[i : i + 2], counted[i : i + 2], 5 / 3) for i in (0, 2, 4)]
    (found,) = torch.autograd.grad(sum(parts) / 3, prediction)
    torch.testing.assert_close(found, whole, rtol=1e-14, atol=0)


def test_fixed_atoms_get_no_gradient() -> None:
    prediction = torch.ones(3, 3, requires_grad=True)
    free = torch.tensor([True, False, True])
    target = torch.tensor([[0.0, 0, 0], [5, 5, 5], [1, 1, 1]])  # the last one is predicted exactly
    force_l2(prediction, target, free).backward()
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad[0], torch.full((3,), 0.5 / 3**0.5))
    assert torch.equal(prediction.grad[1:], torch.zeros(2, 3))

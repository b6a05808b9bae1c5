"""The global random generators of a run."""

import random

import numpy as np
import pytest
import torch

from equiformer2.training.resume import seed_generators


def draws(*given: int) -> tuple[float, float, float]:
    seed_generators(*given)
    return torch.rand(()).item(), float(np.random.rand()), random.random()


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 40)])
def test_all_are_a_function_of_seed_process_and_step(other: tuple[int, int, int]) -> None:
    expected = draws(1, 0, 0)
    assert draws(1, 0, 0) == expected
    assert all(found != known for found, known in zip(draws(*other), expected, strict=True))

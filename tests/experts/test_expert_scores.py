"""Scores of experts by hand, and the bound of dropped experts for random stacks, coefficients and sets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.experts import scores

COEFFICIENTS = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.6, 0.1, 0.2]])


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (1, [0.25, 0.3, 0.0, 0.0]),
        (2, [0.25, 0.45, 0.0, 0.1]),
        (4, [0.3, 0.45, 0.15, 0.1]),
        (9, [0.3, 0.45, 0.15, 0.1]),
    ],
)
def test_tcess_is_the_mean_of_the_leading_coefficients(top: int, expected: list[float]) -> None:
    assert torch.allclose(scores.tcess(COEFFICIENTS, top), torch.tensor(expected).double())


def test_usage_frequency_and_reap_count_the_leading_experts() -> None:
    assert scores.usage_frequency(COEFFICIENTS, 2).tolist() == [0.5, 1.0, 0.0, 0.5]
    outputs = torch.tensor([[2.0, 4.0, 9.0, 9.0], [9.0, 6.0, 9.0, 3.0]])
    assert scores.reap(outputs, COEFFICIENTS, 2).tolist() == [2.0, 5.0, 0.0, 3.0]


def test_equal_coefficients_are_marked_alike_in_any_order_of_experts() -> None:
    even = torch.full((3, 4), 0.25)
    assert scores.in_top(even, 1).all()
    assert scores.tcess(even, 1).tolist() == [0.25] * 4
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(scores.tcess(COEFFICIENTS[:, order], 2), scores.tcess(COEFFICIENTS, 2)[order])
    assert scores.highest(torch.tensor([0.1, 0.3, 0.3, 0.3]), 2) == (1, 2)


def test_random_scores_follow_the_seed() -> None:
    assert torch.equal(scores.random_scores(8, 3), scores.random_scores(8, 3))
    assert not torch.equal(scores.random_scores(8, 3), scores.random_scores(8, 4))


@pytest.mark.parametrize(
    ("keep", "count", "number"), [(0.5, 8, 4), (0.5, 5, 3), (0.5, 3, 2), (0.1, 8, 1), (0.8, 8, 6)]
)
def test_number_of_kept_experts(keep: float, count: int, number: int) -> None:
    assert scores.number_kept(keep, count) == number


@pytest.mark.parametrize(
    ("keep", "count", "message"),
    [
        (0.05, 8, "0.05 of 8 experts keeps none: give at least 0.125"),
        (1.0, 8, "1 of 8 experts keeps all of them: give at most 0.875"),
        (0.99, 8, "keeps all"),
        (0.5, 1, "nothing to remove"),
        (0.0, 8, "above 0 and below 1"),
        (-1.0, 8, "above 0 and below 1"),
        (4.0, 8, "above 0 and below 1"),
        (float("nan"), 8, "above 0 and below 1"),
    ],
)
def test_shares_that_keep_none_or_all(keep: float, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scores.number_kept(keep, count)


def test_scores_that_are_no_numbers() -> None:
    with pytest.raises(InputError, match="not finite"):
        scores.highest(torch.tensor([0.1, float("nan")]), 1)
    with pytest.raises(InputError, match="at least 1"):
        scores.in_top(COEFFICIENTS, 0)


def test_kept_coefficients_sum_to_one_even_where_none_is_used() -> None:
    assert torch.allclose(
        scores.renormalized(COEFFICIENTS, (0, 3)), torch.tensor([[1.0, 0.0], [1 / 3, 2 / 3]])
    )
    assert scores.renormalized(torch.tensor([[1.0, 0.0, 0.0]]), (1, 2)).tolist() == [[0.5, 0.5]]


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Tensor, dict[str, Tensor], tuple[int, ...]]:
    """Coefficients, stacks and kept experts; some nearly unused, some parallel, some of other sizes."""
    count = draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    logits = sharpness * torch.randn(draw(st.integers(1, 4)), count, generator=generator)
    sizes = torch.logspace(0, draw(st.integers(-6, 6)), count)
    stacks = {}
    for name, shape in (("a", (3, 2)), ("b", (2, 3, 4)), ("c", (5,))):
        stack = torch.randn(count, *shape, generator=generator)
        if draw(st.booleans()):
            stack = stack[:1].expand_as(stack)  # parallel: the triangle inequality is an equality
        stacks[name] = stack * sizes.view(-1, *[1] * len(shape))
    kept = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    return logits.softmax(1), stacks, tuple(sorted(kept))


@settings(max_examples=300, deadline=None)
@given(mixtures())
def test_the_bound_is_never_violated(mixture: tuple[Tensor, dict[str, Tensor], tuple[int, ...]]) -> None:
    coefficients, stacks, kept = mixture
    bound = scores.change_bound(coefficients, scores.expert_norms(stacks), kept)
    assert bool((scores.weight_change(coefficients, stacks, kept) <= bound).all())
    after = scores.renormalized(coefficients, kept)
    for column, stack in enumerate(stacks.values()):  # merged in float32, as networks are
        change = coefficients @ stack.flatten(1) - after @ stack[list(kept)].flatten(1)
        assert bool((change.double().norm(dim=1) <= bound[:, column]).all())


def test_the_bound_is_that_of_dropped_experts_and_of_the_new_sum() -> None:
    stacks = {"w": torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]])}
    coefficients = torch.tensor([[0.5, 0.25, 0.25]]).double()
    bound = scores.change_bound(coefficients, scores.expert_norms(stacks), (0, 1))
    # 0.25 * 1 dropped, and (1 / 0.75 - 1) * (0.5 * 5 + 0.25 * 1)
    assert float(bound) == pytest.approx(0.25 + 2.75 / 3, rel=1e-5)

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
    assert scores.highest(torch.tensor([0.1, 0.3, 0.3, 0.3]), 2, even) == (1, 2)


def test_experts_of_equal_scores_are_chosen_by_their_mean_coefficient() -> None:
    once = scores.tcess(COEFFICIENTS[1:], 1)
    assert once.tolist() == pytest.approx([0.0, 0.6, 0.0, 0.0])
    assert scores.highest(once, 2, COEFFICIENTS[1:]) == (1, 3)
    assert scores.highest(once, 3, COEFFICIENTS[1:]) == (0, 1, 3)


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
        scores.highest(torch.tensor([0.1, float("nan")]), 1, COEFFICIENTS[:, :2])
    with pytest.raises(InputError, match="at least 1"):
        scores.in_top(COEFFICIENTS, 0)


def test_kept_coefficients_sum_to_one_even_where_none_is_used() -> None:
    assert torch.allclose(
        scores.renormalized(COEFFICIENTS, (0, 3)), torch.tensor([[1.0, 0.0], [1 / 3, 2 / 3]])
    )
    assert scores.renormalized(torch.tensor([[1.0, 0.0, 0.0]]), (1, 2)).tolist() == [[0.5, 0.5]]
    assert scores.renormalized(torch.tensor([[1.0, 1e-42, 1e-42]]), (1, 2)).tolist() == [[0.5, 0.5]]


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
    products = scores.expert_products(stacks)
    bound = scores.change_bound(coefficients, products, kept)
    assert bool((scores.weight_change(coefficients, products, kept) <= bound).all())
    after = scores.renormalized(coefficients, kept)
    for column, stack in enumerate(stacks.values()):  # merged in float32, as networks are
        change = coefficients @ stack.flatten(1) - after @ stack[list(kept)].flatten(1)
        assert bool((change.double().norm(dim=1) <= bound[:, column]).all())
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    # All weights as one vector.
    whole = scores.change_bound(coefficients, products.sum(0, keepdim=True), kept)[:, 0]
    assert bool((bound.norm(dim=1) <= whole + 1e-6 * norms.sum()).all())
    # The bound from norms of experts alone.
    share = coefficients.double()[:, list(kept)]
    lost = coefficients.double().clone()
    lost[:, list(kept)] = after.double() - share
    assert bool((bound <= (lost @ norms.T) * (1 + 1e-6) + 1e-5 * norms.sum(1)).all())


def test_the_bound_is_that_of_distances_from_what_is_left() -> None:
    stacks = {"w": torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]])}
    coefficients = torch.tensor([[0.5, 0.25, 0.25]]).double()
    products = scores.expert_products(stacks)
    # What is left is (2, 3): the distance of the dropped expert is that of (1, 3), times its coefficient.
    bound = scores.change_bound(coefficients, products, (0, 1))
    assert float(bound) == pytest.approx(0.25 * 10**0.5, rel=1e-5)
    assert float(scores.weight_change(coefficients, products, (0, 1))) == pytest.approx(0.25 * 10**0.5)
    # Two are dropped, (0, 1) and (1, 0), with (3, 4) left.
    bound = scores.change_bound(coefficients, products, (0,))
    assert float(bound) == pytest.approx(0.25 * (18**0.5 + 20**0.5), rel=1e-5)
    change = torch.tensor([3.0, 4.0]) - torch.tensor([1.75, 2.25])
    assert float(scores.weight_change(coefficients, products, (0,))) == pytest.approx(float(change.norm()))


@pytest.mark.parametrize("spread", [0.01, 0.2])
def test_experts_around_a_common_weight_have_a_small_bound(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(1, 40, 40, generator=generator)
    stack = stack + spread * torch.randn(8, 40, 40, generator=generator)
    coefficients = torch.randn(3, 8, generator=generator).softmax(1)
    products = scores.expert_products({"w": stack})
    bound = scores.change_bound(coefficients, products, (0, 2, 4, 6))
    change = scores.weight_change(coefficients, products, (0, 2, 4, 6))
    size = scores.merged_norms(coefficients, products)
    assert bool((bound < 1.2 * spread * size).all())
    assert bool((bound < 3 * change).all())
    exact = coefficients.double().clone()
    exact[:, [0, 2, 4, 6]] -= scores.renormalized(coefficients.double(), (0, 2, 4, 6))
    torch.testing.assert_close(change[:, 0], (exact @ stack.double().flatten(1)).norm(dim=1))

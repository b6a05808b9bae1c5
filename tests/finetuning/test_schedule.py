"""Schedules by number of frames and time."""

import pytest
from tiny_networks import TINY

from equiformer2.finetuning.schedule import UNLIMITED, Speed, choose_schedule, divide_time
from equiformer2.model import ModelConfig

STUDY = ModelConfig(
    num_layers=4, sphere_channels=48, attn_hidden_channels=48, num_heads=4, attn_alpha_channels=12,
    attn_value_channels=12, ffn_hidden_channels=96, lmax=3, mmax=2, grid_resolution=8, edge_channels=48,
)  # fmt: skip
SLOW = Speed(0.35, 0.07)


def test_three_hundred_frames_end_within_the_time() -> None:
    """Two trainings, their starts, a table of 30 frames: twenty minutes on one slow core."""
    each = (18 * 60 - 3 * 30 * SLOW.evaluation) / 2 - 8
    found = choose_schedule(STUDY, 243, 27, SLOW, each)
    assert found.seconds <= each
    assert found.steps < found.wanted
    assert found.steps > 200


@pytest.mark.parametrize(("frames", "size"), [(1, 1), (10, 2), (100, 4), (5000, 8)])
def test_batches_grow_with_the_data(frames: int, size: int) -> None:
    found = choose_schedule(TINY, frames, 5, Speed(1e-4, 1e-4), 1e6)
    assert found.batch_size == size
    assert found.steps == found.wanted
    assert 1 <= found.interval <= found.steps


def test_many_frames_are_seen_less_often() -> None:
    visits = [choose_schedule(TINY, n, 5, Speed(1e-6, 1e-6), 1e9).visits for n in (20, 500, 20_000)]
    assert visits == sorted(visits, reverse=True)
    assert visits[-1] == pytest.approx(5.0, rel=0.01)


def test_what_is_given_is_kept() -> None:
    found = choose_schedule(TINY, 100, 5, SLOW, 1.0, steps=7, batch_size=3, learning_rate=0.1)
    assert (found.steps, found.batch_size, found.learning_rate) == (7, 3, 0.1)
    assert choose_schedule(TINY, 100, 5, SLOW, 1.0).steps == 10


def test_short_time_is_spent_on_small_fast_steps() -> None:
    enough, short = (choose_schedule(STUDY, 4000, 40, SLOW, seconds) for seconds in (1e5, 300))
    assert (enough.batch_size, enough.learning_rate, enough.steps) == (8, 5e-4, enough.wanted)
    assert (short.batch_size, short.learning_rate) == (2, 1e-3)
    assert short.seconds <= 300
    assert short.steps > 200
    # Half of the usual steps are enough for the usual rate, and a few hundred for the usual batch.
    most = choose_schedule(STUDY, 4000, 40, SLOW, 0.6 * enough.seconds)
    assert (most.batch_size, most.learning_rate) == (8, 5e-4)
    given = choose_schedule(STUDY, 4000, 40, SLOW, 300, batch_size=8, learning_rate=5e-4)
    assert (given.batch_size, given.learning_rate) == (8, 5e-4)


def test_trainings_that_want_less_leave_their_time_to_the_others() -> None:
    assert divide_time(100, [500, 500]) == 50
    limit = divide_time(100, [10, 500, 20, 500])
    assert limit == 35
    assert sum(min(limit, wanted) for wanted in (10, 500, 20, 500)) == 100
    assert divide_time(100, [10, 20]) == UNLIMITED
    assert divide_time(-5, [10, 20]) < 0

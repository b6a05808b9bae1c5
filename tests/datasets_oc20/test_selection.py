"""Choices of systems and frames."""

import numpy as np
import pytest

from datasets_oc20.frame_selection import (
    hold_out_systems,
    informative_frames,
    split_later_frames,
    spread_frames,
)


def test_held_out_systems_are_apart_and_repeatable() -> None:
    names = [f"random{number}" for number in range(30)]
    train, unseen = hold_out_systems(names, 5)
    assert len(unseen) == 5
    assert sorted(train + unseen) == sorted(names)
    assert (train, unseen) == hold_out_systems(reversed(names), 5)
    assert unseen != hold_out_systems(names, 5, seed=1)[1]
    with pytest.raises(ValueError, match="cannot hold out 30 of 30"):
        hold_out_systems(names, 30)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 47, 200])
@pytest.mark.parametrize(("fraction", "gap"), [(0.2, 0.1), (0.0, 0.1), (0.5, 0.4), (0.01, 0.0)])
def test_later_frames_are_later_and_apart(count: int, fraction: float, gap: float) -> None:
    earlier, later = split_later_frames(count, fraction, gap)
    assert len(earlier) >= 1
    assert earlier[0] == 0
    if fraction == 0.0 or count == 1:
        assert len(later) == 0
        assert len(earlier) == count
        return
    assert later[-1] == count - 1
    assert len(later) == min(int(np.ceil(count * fraction)), count - 1)
    assert later[0] - earlier[-1] - 1 == round(count * gap) or len(earlier) == 1
    assert earlier[-1] < later[0]


def test_impossible_fractions() -> None:
    for fraction, gap in ((1.0, 0.0), (-0.1, 0.0), (0.5, -0.1), (0.6, 0.4)):
        with pytest.raises(ValueError, match="must be positive"):
            split_later_frames(10, fraction, gap)


def test_spread_frames() -> None:
    assert spread_frames(10, 4).tolist() == [0, 3, 6, 9]
    assert spread_frames(3, 5).tolist() == [0, 1, 2]
    assert spread_frames(0, 5).tolist() == []
    assert spread_frames(10, 1).tolist() == [0]


def test_informative_frames_take_the_range_and_the_largest_forces() -> None:
    forces = np.array([0.5, 0.1, 9.0, 0.2, 0.3, 7.0, 0.1, 0.1, 0.1, 8.0, 0.0])
    # Evenly spread: 0, 5, 10; then the largest of the others: 2 and 9.
    assert informative_frames(forces, 5).tolist() == [0, 2, 5, 9, 10]
    assert informative_frames(forces, 20).tolist() == list(range(11))
    assert informative_frames(np.zeros(50), 6).tolist() == informative_frames(np.zeros(50), 6).tolist()
    for wanted in range(1, 12):
        assert len(set(informative_frames(forces, wanted))) == min(wanted, 11)


def test_later_block_inside_the_relaxation_leaves_gaps_on_both_sides() -> None:
    training, later = split_later_frames(100, 0.2, gap=0.04, tail=0.25)
    assert later.tolist() == list(range(55, 75))
    assert training.tolist() == [*range(51), *range(79, 100)]

"""Division by system: no system on both sides, honest names, the easy case said."""

import numpy as np
import pytest

from datasets_oc20 import DataError
from datasets_oc20.division import divide, group_names

CUO, CU2O = np.array([29, 8]), np.array([29, 29, 8])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(1, 1), (50, 1, 1), (3, 4, 5, 6, 7), (1,) * 30, (90, 2)])
def test_no_system_is_on_both_sides(sizes: tuple[int, ...], seed: int) -> None:
    systems = [f"s{number}" for number, size in enumerate(sizes) for _ in range(size)]
    found = divide(systems, range(len(systems)), 0.2, seed, "data")
    parts = [{systems[row] for row in rows} for rows in (found.train, found.held_out)]
    assert not parts[0] & parts[1]
    assert parts[0]
    assert parts[1]
    assert sorted([*found.train, *found.held_out]) == list(range(len(systems)))
    assert not found.by_time


def test_large_systems_are_left_for_training() -> None:
    found = divide(["large"] * 80 + ["a"] * 5 + ["b"] * 5, range(90), 0.1, 0, "data")
    assert len(found.held_out) <= 10


def test_one_system_is_divided_by_time_and_said_to_be_easy() -> None:
    numbers = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    found = divide(["s"] * 10, numbers, 0.2, 0, "data")
    assert found.by_time
    assert "easy case" in found.sentence
    assert max(numbers[row] for row in found.train) < min(numbers[row] for row in found.held_out)


def test_two_frames_of_one_system_give_one_each() -> None:
    found = divide(["s"] * 2, [0, 1], 0.2, 0, "data")
    assert (found.train.tolist(), found.held_out.tolist()) == ([0], [1])


def test_one_frame_is_refused() -> None:
    with pytest.raises(DataError, match=r"my\.lmdb: one frame"):
        divide(["s"], [0], 0.2, 0, "my.lmdb")


@pytest.mark.parametrize(
    ("sids", "numbers", "groups"),
    [
        (["a", "a", "b"], [CUO, CUO, CUO], ["a", "a", "b"]),
        (["", "", ""], [CUO, CU2O, CUO], ["CuO (2 atoms)", "Cu2O (3 atoms)", "CuO (2 atoms)"]),
        # Each frame a system of its own: the frames of one composition may be of one relaxation.
        (["1", "2", "3"], [CUO, CUO, CU2O], ["CuO (2 atoms)", "CuO (2 atoms)", "Cu2O (3 atoms)"]),
        (["1", "2"], [CUO, CU2O], ["1", "2"]),
        (["a", "a", ""], [CUO, CUO, CU2O], ["a", "a", "Cu2O (3 atoms)"]),
    ],
)
def test_systems_without_useful_ids_go_by_composition(
    sids: list[str], numbers: list[np.ndarray], groups: list[str]
) -> None:
    assert group_names(sids, numbers) == groups

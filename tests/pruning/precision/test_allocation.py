"""Precisions that fit a limit of bytes."""

import pytest
from search_helpers import tiny_model

from equiformer2.errors import InputError
from equiformer2.pruning.precision.allocation import (
    PRECISIONS,
    PartSizes,
    by_information,
    by_sensitivity,
    fitted,
)
from equiformer2.pruning.precision.compact import matrix_bytes
from equiformer2.pruning.precision.search import Base, PrecisionSearch, PrecisionState, Trial

SHAPES = {"a": (1000, 1000), "b.0": (500, 1000), "b.1": (500, 1000), "c": (1000, 1000)}
PARTS = {"a": ["a"], "b": ["b.0", "b.1"], "c": ["c"]}
LOSSES = {
    "a": {"float32": 0.0, "bf16": 0.1, "int8": 1.0, "int4": 10.0},
    "b": {"float32": 0.0, "bf16": 0.01, "int8": 0.1, "int4": 1.0},
    "c": {"float32": 0.0, "bf16": 0.001, "int8": 0.01, "int4": 0.1},
}
BITS = {"a": 0.1, "b": 0.2, "c": 0.3}


def sizes(megabytes: float) -> PartSizes:
    return PartSizes.of_matrices(PARTS, SHAPES, int(1e6 * megabytes))


@pytest.mark.parametrize(
    ("megabytes", "expected"),
    [(1.6, "int4 int4 int4"), (2.1, "int8 int4 int4"), (3.2, "int8 int8 int8"), (12.1, "float32 " * 3)],
)
def test_the_sensitive_parts_get_the_room(megabytes: float, expected: str):
    room = sizes(megabytes)
    choice = by_sensitivity(room, LOSSES)
    assert list(choice.values()) == expected.split()
    assert room.total(choice) <= room.room


def test_information_raises_the_telling_parts_first():
    assert by_information(sizes(2.1), BITS) == {"a": "int4", "b": "int4", "c": "int8"}
    assert by_information(sizes(4.2), BITS) == {"a": "int8", "b": "int8", "c": "bf16"}


@pytest.mark.parametrize("megabytes", [1.6, 2.0, 2.7, 3.3, 5.0, 7.0, 12.1])
@pytest.mark.parametrize("wanted", PRECISIONS)
def test_any_choice_is_made_to_fit(megabytes: float, wanted: str):
    room = sizes(megabytes)
    choice = fitted(room, LOSSES, {"a": wanted, "b": wanted})
    assert set(choice) == set(PARTS)
    assert room.total(choice) <= room.room


def test_a_room_that_is_too_small_is_refused():
    with pytest.raises(InputError, match="at least"):
        by_sensitivity(sizes(1.0), LOSSES)


def test_small_matrices_stay_float32_where_their_scales_take_more_than_they_save():
    assert matrix_bytes((4, 4), "int4") > matrix_bytes((4, 4), "float32")
    small = PartSizes.of_matrices({"x": ["x"]}, {"x": (4, 4)}, 10_000)
    assert small.smallest() == {"x": "float32"}


def test_precisions_that_one_network_alone_may_have_are_proposed_and_made_to_fit():
    """Measured times may favour bfloat16 in a pruned network only."""
    pytest.importorskip("optuna")
    only_plain = PartSizes({"a": {"float32": 0}, "b": {"float32": 0}}, 0)
    quicker = PartSizes({"a": {"float32": 5, "bf16": 0}, "b": {"float32": 0}}, 5)
    bases = [Base(None, tiny_model(), {"a": ["a"], "b": ["b"]}, sizes) for sizes in (only_plain, quicker)]
    losses = {part: {"float32": 0.0, "bf16": 0.1} for part in "ab"}
    state = PrecisionState({}, trials=[Trial(1, {"a": "bf16", "b": "float32"}, 0.1, "search")])
    search = PrecisionSearch(bases, losses, {"a": 0.0, "b": 0.0}, lambda base, choice: 1.0, state, 0, False)
    search.run(8)
    assert len(state.trials) == 8
    tried = {(trial.base, trial.precisions["a"]) for trial in state.trials}
    assert tried == {(0, "float32"), (1, "float32"), (1, "bf16")}

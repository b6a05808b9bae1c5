"""The lists of elements and adsorbates that a checkpoint was trained on, as files of any origin tell them."""

from typing import Any

import pytest
import torch

from equiformer2.checkpoint.training_data import TrainingData

FIRST = {"elements": {"Cu": 5, "O": 5}, "earlier": []}
SECOND = {"elements": {"H": 2, "O": 3}, "earlier": [{"elements": {"Cu": 5, "O": 5}}]}


def test_elements_of_all_stages_count() -> None:
    assert TrainingData({"training_data": FIRST}).elements == {"O": 5, "Cu": 5}
    seen = TrainingData({"training_data": SECOND})
    assert seen.elements == {"H": 2, "O": 8, "Cu": 5}
    unseen = seen.unseen(90)
    assert unseen is not None
    assert torch.nonzero(~unseen).flatten().tolist() == [1, 8, 29]
    assert seen.unseen(20) is not None  # a network with a smaller table


def test_each_training_adds_one_stage() -> None:
    before = TrainingData({"training_data": SECOND}).before()
    assert before == [{"elements": {"Cu": 5, "O": 5}}, {"elements": {"H": 2, "O": 3}}]


@pytest.mark.parametrize(
    "stage",
    [
        None,
        "Cu",
        {"energy_mean_eV": -1.0},
        {"elements": {"Cu": 5}},
        {"elements": {"Cu": 5}, "earlier": None},
        {"elements": {"Cu": 5}, "earlier": [{}]},
        {"elements": {"Cu": 5}, "earlier": ["x"]},
        {"elements": ["Cu"], "earlier": []},
        {"elements": {"copper": 5}, "earlier": []},
        {"elements": {"Cu": "5"}, "earlier": []},
        {"elements": {"Cu": True}, "earlier": []},
        {"elements": {"Cu": -1}, "earlier": []},
    ],
)
def test_what_is_not_known_marks_nothing(stage: Any) -> None:
    for provenance in ({}, {"training_data": stage}):
        seen = TrainingData(provenance)
        assert (seen.elements, seen.unseen(90), seen.before()) == (None, None, None)


def test_a_training_without_elements_marks_nothing() -> None:
    assert TrainingData({"training_data": {"elements": {}, "earlier": []}}).unseen(90) is None

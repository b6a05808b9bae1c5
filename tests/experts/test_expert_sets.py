"""Sets of experts and the nearest one, on coefficients made by hand."""

import pytest
import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.experts.sets import make_sets, nearest, nearest_composition

ONE, OTHER = [0.7, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.7]


def answers(rows: list[list[float]], shift: float = 0.0) -> Tensor:
    """Coefficients `[systems, 2 tasks, 4]` that are nearly the same for both tasks."""
    table = torch.tensor(rows) + shift * torch.tensor([1.0, -1.0, 0.0, 0.0])
    return torch.stack((table, table), 1)


GIVEN = {"a": torch.cat((answers([ONE]), answers([ONE], 0.05))), "b": answers([OTHER])}
SHARES = {"a": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), "b": torch.tensor([[0.0, 0.0, 1.0]])}


def test_a_set_per_task_holds_the_experts_with_the_highest_scores() -> None:
    sets = make_sets(GIVEN, SHARES, number=2, top=2)
    assert [(each.task, each.experts) for each in sets] == [("a", (0, 1)), ("b", (2, 3))]
    assert sets[0].composition.tolist() == [0.5, 0.5, 0.0]
    assert sets[1].reach == 0.0


def test_a_set_per_composition() -> None:
    sets = make_sets(GIVEN, SHARES, number=1, top=1, per="composition")
    assert [(each.task, each.experts) for each in sets] == [("a", (0,)), ("a", (0,)), ("b", (3,))]
    again = {name: torch.cat((values, values)) for name, values in GIVEN.items()}
    shares = {name: torch.cat((values, values)) for name, values in SHARES.items()}
    double = make_sets(again, shares, number=1, top=1, per="composition")
    assert [(each.task, each.reach) for each in double] == [(each.task, each.reach) for each in sets]
    assert sets[0].reach > 0
    with pytest.raises(InputError, match="per task or composition, not per 'element'"):
        make_sets(GIVEN, SHARES, 1, 1, per="element")  # type: ignore[arg-type]


@pytest.mark.parametrize("per", ["task", "composition"])
def test_the_nearest_set_and_how_near_it_is(per: str) -> None:
    sets = make_sets(GIVEN, SHARES, 2, 2, per)  # type: ignore[arg-type]
    inside = nearest(sets, answers([ONE], 0.02)[0].flatten())
    assert (inside.chosen.task, inside.far, inside.second) == ("a", False, "b")
    assert inside.distance < inside.second_distance
    other = nearest(sets, answers([OTHER])[0].flatten())
    assert (other.chosen.task, other.far) == ("b", False)
    between = nearest(sets, answers([[0.3, 0.2, 0.2, 0.3]], 0.05)[0].flatten())
    assert between.far


def test_the_baseline_asks_for_compositions_alone() -> None:
    sets = make_sets(GIVEN, SHARES, 2, 2)
    assert nearest_composition(sets, torch.tensor([0.1, 0.1, 0.8])).chosen.task == "b"
    alone = make_sets({"a": GIVEN["a"][:, :1]}, SHARES, 2, 2)
    assert nearest_composition(alone, torch.tensor([0.1, 0.1, 0.8])).second is None

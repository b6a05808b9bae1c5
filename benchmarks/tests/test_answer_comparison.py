"""The benchmark refuses to time implementations that compute different things."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.answer_comparison import compare_answers, compare_outputs, deviation


def answers(**changes: Any) -> dict[str, Any]:
    """Two periodic images of one pair and a third edge; one draw with energies, forces and a gradient."""
    draw = {
        "energy": torch.tensor([1.0, 2.0]),
        "forces": torch.tensor([[0.1, 0.0, 0.0], [0.0, -0.2, 0.0]]),
        "gradients": {"weight": torch.tensor([3.0, 4.0])},
    }
    draw |= {key: value for key, value in changes.items() if key in draw}
    graph = {
        "edge_index": torch.tensor([[0, 0, 1], [1, 1, 0]]),
        "vectors": torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    }
    graph |= {key: value for key, value in changes.items() if key in graph}
    return graph | {"draws": [draw]}


def compare(folder: Path, ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, bool]:
    torch.save(ours, folder / "ours.pt")
    torch.save(reference, folder / "reference.pt")
    rows = compare_answers(folder / "ours.pt", folder / "reference.pt")
    return {row.quantity.split(" ")[0]: row.agrees for row in rows}


def test_equal_answers_agree_whatever_the_order_of_edges(tmp_path: Path) -> None:
    order = torch.tensor([2, 1, 0])
    same = answers()
    shuffled = answers(edge_index=same["edge_index"][:, order], vectors=same["vectors"][order])
    assert compare(tmp_path, shuffled, same) == {
        "edge": True,
        "energy": True,
        "forces": True,
        "gradients": True,
    }


@pytest.mark.parametrize(
    ("quantity", "values"),
    [
        ("energy", torch.tensor([1.0, 2.01])),
        ("forces", torch.tensor([[0.1, 0.0, 0.001], [0.0, -0.2, 0.0]])),
        ("gradients", {"weight": torch.tensor([3.0, 4.01])}),
    ],
)
def test_a_difference_is_seen(tmp_path: Path, quantity: str, values: Any) -> None:
    found = compare(tmp_path, answers(**{quantity: values}), answers())
    assert [name for name, agrees in found.items() if not agrees] == [quantity]


def test_scatter_of_the_reference_is_allowed_for(tmp_path: Path) -> None:
    reference = answers()
    reference["draws"] += answers(energy=torch.tensor([1.0, 2.02]))["draws"]
    assert compare(tmp_path, answers(), reference)["energy"]


def test_another_image_of_the_same_pair_is_another_edge(tmp_path: Path) -> None:
    moved = answers(vectors=torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.1, 0.0], [0.0, 1.0, 0.0]]))
    assert not compare(tmp_path, moved, answers())["edge"]


def test_other_edges_end_the_comparison(tmp_path: Path) -> None:
    fewer = answers(edge_index=torch.tensor([[0, 1], [1, 0]]), vectors=torch.eye(3)[:2])
    with pytest.raises(ValueError, match="2 edges here, 3 in the reference"):
        compare(tmp_path, fewer, answers())


def test_other_parameters_end_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bias"):
        compare(tmp_path, answers(gradients={"bias": torch.ones(2)}), answers())


def test_outputs_are_compared_without_a_graph(tmp_path: Path) -> None:
    for name, energy in (("ours", 1.0), ("reference", 1.1)):
        draw = answers(energy=torch.tensor([energy, 2.0]))["draws"][0]
        torch.save({"draws": [draw]}, tmp_path / f"{name}.pt")
    rows = compare_outputs(tmp_path / "ours.pt", tmp_path / "reference.pt")
    assert {row.quantity: row.agrees for row in rows} == {"energy": False, "forces": True}


def test_deviation_is_relative_to_the_plain_answers(tmp_path: Path) -> None:
    torch.save(answers(), tmp_path / "plain.pt")
    torch.save(answers(energy=torch.tensor([1.0, 2.1])), tmp_path / "other.pt")
    found = deviation(tmp_path / "other.pt", tmp_path / "plain.pt")
    # One of two energies is off by 0.1; their rms is sqrt(5 / 2).
    assert found["energy"] == pytest.approx(0.1 / 5**0.5)
    assert found["energy_largest"] == pytest.approx(0.1, rel=1e-6)
    assert found["forces"] == 0.0

"""A graph that the caller gives is checked before a kernel reads memory by its indices."""

import dataclasses

import pytest
import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph, checked_graph

EDGES = torch.tensor([[1, 2, 0, 1], [0, 0, 1, 2]])


def graph_of(edge_index: Tensor) -> RadiusGraph:
    edges = edge_index.shape[1]
    offsets = torch.zeros(edges, 3, dtype=torch.int64)
    return RadiusGraph(edge_index, offsets, torch.ones(edges, 3), torch.ones(edges))


def test_good_graphs_pass() -> None:
    for edge_index in (EDGES, EDGES[:, :0], EDGES.t().contiguous().t()):
        graph = graph_of(edge_index)
        assert checked_graph(graph, 3) is graph


@pytest.mark.parametrize(
    ("edge_index", "message"),
    [
        (EDGES.int(), r"torch.int32; it must be int64"),
        (EDGES.float(), r"torch.float32; it must be int64"),
        (EDGES.t(), r"shape \(4, 2\); it must be \[2, E\]"),
        (torch.tensor([[0, 3], [0, 1]]), r"edge 1 .* from atom 3 to atom 1, but the batch has 3 atoms"),
        (torch.tensor([[0, 1], [0, 7]]), r"edge 1 .* from atom 1 to atom 7"),
        (torch.tensor([[-1, 1], [0, 1]]), r"edge 0 .* from atom -1 to atom 0"),
        (EDGES.flip(1), r"edge 1 .* ends at atom 1, the one before it at atom 2: sort the edges"),
    ],
)
def test_wrong_edges_are_refused(edge_index: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_graph(graph_of(edge_index), 3)


@pytest.mark.parametrize("name", ["vectors", "distances"])
def test_lengths_must_agree(name: str) -> None:
    graph = graph_of(EDGES)
    shorter = dataclasses.replace(graph, **{name: getattr(graph, name)[:3]})
    with pytest.raises(InputError, match=f"graph.{name} has the shape .* the 4 edges"):
        checked_graph(shorter, 3)

"""`EquiformerV2.forward(batch, graph=…)`: the network takes any layout of good edges, and no bad ones."""

import dataclasses

import pytest
import torch
from model_helpers import batch_of, cluster, random_model, small_config

from equiformer2.errors import InputError


def test_edges_in_another_layout_give_the_same_answers() -> None:
    model, batch = random_model(small_config(num_layers=1)), batch_of(cluster())
    graph = model.build_graph(batch)
    strided = dataclasses.replace(graph, edge_index=graph.edge_index.t().contiguous().t())
    assert not strided.edge_index[1].is_contiguous()
    answers = []
    for given in (graph, strided):
        out = model(batch, graph=given)
        (grad,) = torch.autograd.grad(out["energy"].sum(), model.sphere_embedding.weight)
        answers.append((out["energy"], out["forces"], grad))
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("forces", ["direct", "gradient"])
def test_bad_edges_are_refused(forces: str) -> None:
    model, batch = random_model(small_config(num_layers=1, forces=forces)), batch_of(cluster())
    graph = model.build_graph(batch)
    for edge_index, message in (
        (graph.edge_index.int(), "must be int64"),
        (graph.edge_index + 1, "the batch has 7 atoms"),
        (graph.edge_index.flip(1), "sort the edges by their target"),
    ):
        with pytest.raises(InputError, match=message):
            model(batch, graph=dataclasses.replace(graph, edge_index=edge_index))

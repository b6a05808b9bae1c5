"""PageRank on the attention graph, head filter, similarity, dropped edges."""

import pytest
import torch
from routing_helpers import Watched, as_data, decisions, exact_model, masks, molecule_data, slab_atoms
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.pruning.routing import AtomPruner, EdgePruner
from equiformer2.pruning.routing.batch_geometry import BatchGeometry
from equiformer2.pruning.routing.ftp import received_attention
from equiformer2.pruning.routing.zero_tprune import (
    combine_heads,
    heads_between_quantiles,
    invariant_key,
    redundancy,
    weighted_pagerank,
)


def attention_graph(num_atoms: int = 6, heads: int = 3):  # type: ignore[no-untyped-def]
    """Random weights, several edges between some pairs, one atom without incoming edges."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(num_atoms, (40,), generator=generator)
    target = torch.randint(num_atoms - 1, (40,), generator=generator)
    weights = torch.rand(40, heads, generator=generator, dtype=torch.float64)
    total = torch.zeros(num_atoms, heads, dtype=torch.float64).index_add(0, target, weights)
    return weights / total[target], source, target


def test_pagerank_is_the_matrix_iteration() -> None:
    alpha, source, target = attention_graph()
    found = weighted_pagerank(alpha, source, target, 6, damping=0.85, iterations=4)
    for head in range(3):
        matrix = torch.zeros(6, 6, dtype=torch.float64)
        matrix.index_put_((target, source), alpha[:, head], accumulate=True)
        matrix[5, 5] = 1.0  # nothing enters the last atom
        scores = torch.full((6,), 1 / 6, dtype=torch.float64)
        for _ in range(4):
            scores = 0.15 / 6 + 0.85 * matrix.T @ scores
        torch.testing.assert_close(found[:, head], 6 * scores)
    torch.testing.assert_close(found.sum(0), torch.full((3,), 6.0, dtype=torch.float64))
    torch.testing.assert_close(
        received_attention(alpha, source, 6).sum(), torch.tensor(5.0, dtype=torch.float64)
    )


def test_heads() -> None:
    variances = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 100.0]])
    kept = heads_between_quantiles(variances, 0.1, 0.9)
    assert kept.tolist() == [[False, True, True, True], [True, True, True, False]]
    # A block with extreme heads only keeps the least extreme one.
    kept = heads_between_quantiles(torch.tensor([[0.0, 0.1], [5.0, 5.1], [5.2, 5.3]]), 0.3, 0.9)
    assert kept.tolist()[0] == [False, True]
    scores = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert combine_heads(scores).tolist() == pytest.approx([5**0.5, 2.0])
    assert combine_heads(scores, torch.tensor([True, False])).tolist() == [1.0, 2.0]


def test_the_head_filter_changes_the_choice() -> None:
    model = exact_model(num_heads=4)
    batch = Batch.from_data_list([as_data(slab_atoms(0.1)), as_data(slab_atoms(0.05, "CO"))])
    router = AtomPruner(0.5).with_head_filter(model, [batch], 0.2, 0.8)
    assert 4 <= sum(map(sum, router.heads)) < 16
    assert all(any(row) for row in router.heads)
    one = AtomPruner(0.5, similar=0.0, heads=[[True, False, False, False]] * 4)
    other = AtomPruner(0.5, similar=0.0, heads=[[False, False, False, True]] * 4)
    data = as_data(slab_atoms(0.1))
    assert any(
        (a != b).any() for a, b in zip(masks(model, one, data), masks(model, other, data), strict=True)
    )


def test_what_resembles_a_more_important_neighbour_is_redundant() -> None:
    model, batch = exact_model(), Batch.from_data_list([molecule_data()])
    graph = model.build_graph(batch)
    system = BatchGeometry.from_batch(batch, graph)
    x = torch.randn(9, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    source, target = graph.edge_index[:, 0].tolist()
    x[source] = x[target]
    importance = torch.linspace(1, 2, 9, dtype=torch.float64)
    importance[source], importance[target] = 5.0, 3.0
    found = redundancy(system, x, importance)
    assert found[target] > 0.999
    assert found[source] < 0.9
    # Equivalent atoms are no reason to skip each other.
    assert redundancy(system, x[:1].expand(9, -1, -1), torch.ones(9, dtype=torch.float64)).max() < 0


def test_keys_are_invariant() -> None:
    x = torch.randn(5, 9, 4)
    turned = x.clone()
    turned[:, 1:4] = turned[:, [2, 3, 1]]
    turned[:, 4:] = -turned[:, 4:]
    torch.testing.assert_close(invariant_key(turned), invariant_key(x))
    assert invariant_key(x).shape == (5, 12)


def test_both_stages_share_the_budget() -> None:
    model, data = exact_model(), as_data(slab_atoms(0.1))
    for similar in (0.0, 0.5, 1.0):
        for mask in masks(model, AtomPruner(0.4, similar=similar), data):
            assert (~mask).double().mean() == pytest.approx(0.4, abs=0.1)
    chosen = [torch.stack(masks(model, AtomPruner(0.4, similar=s), data)) for s in (0.0, 1.0)]
    assert (chosen[0] != chosen[1]).any()


def test_edges_below_a_share_of_the_mean_are_dropped() -> None:
    model, data = exact_model(), as_data(slab_atoms(0.1))
    batch = Batch.from_data_list([data])
    target = model.build_graph(batch).edge_index[1]
    states = []

    class Seen(EdgePruner):
        def decide(self, system, state, level, before):  # type: ignore[no-untyped-def]
            states.append(state.attention)
            return super().decide(system, state, level, before)

    watched = Watched(Seen(0.8, mode="threshold"))
    model(batch, active=watched)
    degree = torch.bincount(target)[target]
    edges = watched.decisions[1].edges
    torch.testing.assert_close(edges, states[0].mean(dim=1) * degree > 0.8)
    # Every atom keeps an edge, even where nothing passes.
    for decision in decisions(model, EdgePruner(50.0, mode="threshold"), data):
        if decision.edges is not None:
            assert torch.equal(target[decision.edges].unique(), target.unique())


@pytest.mark.parametrize("router", [AtomPruner, EdgePruner])
@pytest.mark.parametrize("mode", ["topk", "threshold", "smooth"])
def test_the_first_block_computes_everything(router, mode: str) -> None:  # type: ignore[no-untyped-def]
    first, second, *_ = decisions(exact_model(), router([0.9] * 4, mode=mode, width=0.05), molecule_data())
    assert first == (None, None, False)
    assert second != (None, None, False)


def test_refusals() -> None:
    with pytest.raises(InputError, match="strongest edges of an atom would close"):
        EdgePruner(0.95, mode="smooth", width=0.1)
    with pytest.raises(InputError, match=r"similar.* 2"):
        AtomPruner(0.5, similar=2)
    with pytest.raises(InputError, match="at least one calibration batch"):
        AtomPruner(0.5).with_head_filter(exact_model(), [])

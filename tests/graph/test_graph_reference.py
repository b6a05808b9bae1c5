"""The graphs are those of the reference implementation (tests/fixtures/graph/README.md)."""

from pathlib import Path

import pytest
import torch
from graph_helpers import Structures, edges, graph_of, sorted_distances

FIXTURE = Path(__file__).parents[1] / "fixtures" / "graph" / "reference_graphs.pt"
REFERENCE = torch.load(FIXTURE, weights_only=True)
WITH_TIES = {"cu111_perfect", "cu_prim"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REFERENCE)
def test_edges_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    system = REFERENCE[name]
    s = Structures(
        system["pos"].to(dtype),
        system["cell"].to(dtype)[None],
        system["pbc"][None],
        torch.tensor([len(system["pos"])]),
    )
    for expected in system["graphs"]:
        graph = graph_of(s, expected["max_radius"], expected["max_neighbors"], expected["strict"])
        assert graph.edge_index.shape == expected["edge_index"].shape
        ours = sorted_distances(graph.edge_index[1], graph.distances)
        theirs = sorted_distances(expected["edge_index"][1], expected["distances"])
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1].to(dtype), rtol=0, atol=5e-6)
        if name not in WITH_TIES or not expected["strict"]:
            assert edges(graph.edge_index, graph.cell_offsets) == edges(
                expected["edge_index"], expected["cell_offsets"]
            )


def test_a_batch_is_its_structures_side_by_side() -> None:
    names = ["cu111_co", "water_nopbc", "skewed", "isolated", "cu_prim"]
    parts = [
        Structures(
            REFERENCE[n]["pos"],
            REFERENCE[n]["cell"][None],
            REFERENCE[n]["pbc"][None],
            torch.tensor([len(REFERENCE[n]["pos"])]),
        )
        for n in names
    ]
    together = graph_of(Structures(*(torch.cat(column) for column in zip(*parts, strict=True))))
    first_atom = first_edge = 0
    for part in parts:
        alone = graph_of(part)
        last_edge = first_edge + alone.edge_index.shape[1]
        assert torch.equal(together.edge_index[:, first_edge:last_edge], alone.edge_index + first_atom)
        assert torch.equal(together.cell_offsets[first_edge:last_edge], alone.cell_offsets)
        assert torch.equal(together.vectors[first_edge:last_edge], alone.vectors)
        first_atom, first_edge = first_atom + len(part.pos), last_edge
    assert first_edge == together.edge_index.shape[1]

"""The script behind docs/results/equivariance.md."""

import json
from pathlib import Path

import torch
from torch_geometric.data import Batch

from benchmarks import measure_equivariance as script


def test_turned_frames_are_rotations_with_the_same_axis() -> None:
    model, data = script.random_network(2, 2, "initial", 0), script.structure()
    graph = model.build_graph(data)
    plain = script.EdgeFrames.from_vectors(graph.vectors, graph.distances, 2, 2).blocks[1]
    turned = script.turned_frames(model, graph, torch.Generator().manual_seed(0)).blocks[1]
    # Row 0 (m = 0) is the direction of the edge; the others turn.
    torch.testing.assert_close(turned[:, 0], plain[:, 0])
    torch.testing.assert_close(torch.linalg.det(turned), torch.linalg.det(plain))
    assert (turned[:, 1] - plain[:, 1]).abs().mean() > 0.1


def test_both_grids_are_really_replaced() -> None:
    model, batch = script.random_network(2, 2, "random", 0), Batch.from_data_list([script.structure()])
    outputs = []
    with torch.no_grad():
        for attention, feed_forward in (((6, 7), (6, 7)), ((8, 9), (6, 7)), ((6, 7), (8, 9))):
            script.set_grids(model, attention, feed_forward)
            outputs.append(model(batch)["forces"])
        script.set_grids(model, (18, 18), (18, 18))
        released = model(batch)["forces"]
        fresh = script.random_network(2, 2, "random", 0)(batch)["forces"]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert torch.equal(released, fresh)


def test_report(tmp_path: Path) -> None:
    few = ["--seeds", "1", "--trials", "1", "--lmax", "1", "--grids", "4x5", "18x18"]
    script.main([*few, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "equivariance.json").read_text())
    assert len(record["rows"]) == 8
    coarse, fine = (
        row for row in record["rows"] if row["varied"] == "feed-forward" and row["weights"] == "random"
    )
    assert coarse["rotation_forces"]["float64"][0] > 10 * fine["rotation_forces"]["float64"][0]
    text = (tmp_path / "equivariance.md").read_text()
    assert text.count("| 4 x 5 |") == text.count("| 18 x 18 |") == 2
    assert (tmp_path / "equivariance.png").read_bytes().startswith(b"\x89PNG")

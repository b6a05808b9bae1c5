"""The bound on what remembering edges between held atoms saves."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import equiformer2_network as ours
from benchmarks import operation_counts as counting
from benchmarks.held_edges import BUNDLED, held_edges, main, report, structures
from benchmarks.network_sizes import SIZES
from equiformer2.errors import InputError


def test_edges_between_held_atoms_are_counted() -> None:
    (structure,) = structures(BUNDLED, 1)
    model = ours.build(SIZES["toy"], None)
    held, edges = held_edges(model, structure)
    assert 0 < held < edges
    structure.fixed = torch.ones_like(structure.fixed)
    assert held_edges(model, structure) == (edges, edges)
    structure.fixed = torch.zeros_like(structure.fixed)
    assert held_edges(model, structure) == (0, edges)
    with pytest.raises(InputError, match="0 are there"):
        structures(BUNDLED.parent, 1)


def test_the_bound_is_a_share_of_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--sizes", "toy", "--systems", "2", "--json", str(tmp_path / "held.json")])
    row = json.loads((tmp_path / "held.json").read_text())["sizes"]["toy"]
    assert row["bound"] == pytest.approx(row["held_edges_share"] * row["spared_share"])
    assert 0 < row["bound"] < row["spared_share"] < 1
    shares = row["parts_share"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(shares[name] > 0 for name in (counting.RADIAL, counting.FRAMES, counting.EDGE_DEGREE))
    assert f"| toy | 2 | {row['held_edges_share']:.1%} |" in capsys.readouterr().out
    assert "worth trying at toy" in report({"toy": {**row, "bound": 0.06}})
    assert "not worth keeping" in report({"toy": {**row, "bound": 0.01}})

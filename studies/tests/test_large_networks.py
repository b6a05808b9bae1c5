"""Sizes, memory and times of large networks: what is measured, at tiny size, and what is not repeated."""

from pathlib import Path

import pytest

from equiformer2.files import read_json
from equiformer2.model import ModelConfig
from studies import large_networks

TINY = {
    **{"num_layers": 1, "sphere_channels": 16, "attn_hidden_channels": 16, "num_heads": 2},
    **{"attn_alpha_channels": 8, "attn_value_channels": 8, "ffn_hidden_channels": 16, "lmax": 2, "mmax": 1},
    **{"grid_resolution": 8, "edge_channels": 16, "num_distance_basis": 32, "max_neighbors": 4},
}


def test_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelConfig, "preset", staticmethod(lambda name: ModelConfig(**TINY)))
    words = ["--sizes", "31M", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "page")]
    large_networks.main(words)
    rows = {row["run"]: row for row in read_json(tmp_path / "page.json")["runs"]}

    sizes = [rows[f"31M-stored-{way}"]["bytes"] for way in ("float32", "bf16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["31M-stored-float32"]["resident_bytes"] == rows["31M-stored-float32"]["resident_bytes_dense"]
    assert rows["31M-stored-int4"]["resident_bytes"] < 0.6 * rows["31M-stored-float32"]["resident_bytes"]

    dense, sparse = rows["31M-adapted-adapter"], rows["31M-adapted-adapter_80_removed"]
    assert sparse["bytes"] < dense["bytes"] < dense["bytes_float32"]
    assert sparse["trained"] < dense["trained"] < dense["parameters"]
    whole, adapter = rows["31M-trained-all_weights"], rows["31M-trained-adapter"]
    assert adapter["optimizer_bytes"] < 0.5 * whole["optimizer_bytes"]
    assert adapter["trained"] == dense["trained"]

    page = (tmp_path / "page.md").read_text()
    assert "| stored in int4 |" in page
    assert "| adapter, 80 % removed |" in page
    # Another call measures nothing: times would not be the same.
    large_networks.main(words)
    assert (tmp_path / "page.md").read_text() == page

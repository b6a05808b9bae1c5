"""The study of precisions: its verdicts from given rows, and all parts at the smallest size."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from studies import precision

sys.path.append(str(Path(__file__).parents[2] / "tests" / "pruning"))
from search_helpers import save_tiny, slab, slabs, write_lmdb


def row(name: str, share: float, ratio: float) -> dict[str, Any]:
    errors = {"force_mae_ratio": ratio, "equivariance_ratio": 1.0}
    return {"run": name, "bytes": int(1e6 * share), "bytes_ratio": share, "errors": {"test": errors}}


def test_verdicts() -> None:
    rows = [row("int8", 0.3, 1.01), row("search-0.2-0", 0.19, 1.005), row("int4", 0.15, 1.5)]
    found = {verdict.question: verdict.holds for verdict in precision.verdicts(rows, "test")}
    assert found["search-0.2: at most 20% of the bytes at most 2 % worse (test, labels)"]
    assert found["int8 does not dominate the front"]  # nothing searched is as large
    assert found["int4 does not dominate the front"]  # smaller, and worse


def test_verdicts_are_of_means_over_seeds() -> None:
    """One lucky seed is no front, and a smaller limit has a verdict of its own."""
    rows = [row(f"search-0.2-{seed}", 0.19, ratio) for seed, ratio in enumerate((1.0, 1.02, 1.04))]
    rows += [
        row("search-0.17-0", 0.17, 1.2),
        row("pruned-int8-0", 0.18, 1.01),
        row("pruned-int8-1", 0.18, 1.02),
    ]
    found = {verdict.question: verdict for verdict in precision.verdicts(rows, "test")}
    question = "at most 20% of the bytes at most 2 % worse (test, labels)"
    assert found[f"search-0.2: {question}"].holds
    assert not found[f"search-0.17: {question}"].holds
    assert not found["pruned-int8 does not dominate the front"].holds
    assert "search-0.2 1.0200 of the force MAE" in found["pruned-int8 does not dominate the front"].measured


def test_a_search_that_was_interrupted_is_not_timed() -> None:
    rows = [{"run": "a", "seconds_of_command": None}, {"run": "b", "seconds_of_command": 60.0}]
    (found,) = precision.verdicts(rows, "test")
    assert found.measured == "at most 1.0 min in 1 searches that were not interrupted"
    assert precision.verdicts(rows[:1], "test") == []


@pytest.mark.slow
def test_all_parts_are_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"sphere_channels": 32, "attn_hidden_channels": 32, "ffn_hidden_channels": 48, "num_layers": 1}
    save_tiny(tmp_path / "dense.pt", **wide)
    write_lmdb(tmp_path / "data.lmdb", [*slabs(), slab("d", "Ag")])
    options = argparse.Namespace(
        checkpoint=tmp_path / "dense.pt",
        data=[str(tmp_path / "data.lmdb")],
        held_out=[f"test={tmp_path / 'data.lmdb'}"],
        part=list(precision.PARTS),
        limits=[0.5],
        seeds=[0],
        keep=[0.9],
        trials=3,
        structures=2,
        held_out_structures=1,
        batch_size=1,
        hours=1.0,
        recovery_steps=2,
        out=tmp_path / "out",
        results=tmp_path / "page",
    )
    precision.run(options)
    files = {path.name.removesuffix(".result.json") for path in options.out.glob("*.result.json")}
    assert {"float32", "int4", "search-0.5-0", "information-0.5-0", "sensitivity-0.5-0"} <= files
    assert {"pruned-int8-0", "pruned-search-0.5-0", "pruned-information-0.5-0"} <= files
    assert {"memory-float32-all-stored", "memory-int4-low_rank-recomputed"} <= files
    assert {"recovery-int4-loftq-untrained", "recovery-int4-loftq-2-0", "recovery-int4-zero-2-0"} <= files
    assert {"time-bf16-everywhere", "time-0.5"} <= files
    times = {path: path.stat().st_mtime_ns for path in options.out.glob("*.json")}
    precision.run(options)
    assert {path: path.stat().st_mtime_ns for path in options.out.glob("*.json")} == times
    page = (tmp_path / "page.md").read_text()
    assert "## test" in page
    assert "## Memory of a training step" in page
    assert "## Time of a force call" in page
    assert "an adapter recovers from int4" in page
    options.hours, options.seeds = 0.0, [0, 1]
    precision.run(options)
    assert "rows are left" in capsys.readouterr().out

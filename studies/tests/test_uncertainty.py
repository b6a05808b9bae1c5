"""Coverage and rank correlation of committees: known populations, and the whole study at its smallest."""

import json
from pathlib import Path

import numpy as np
import pytest

from equiformer2.errors import InputError
from studies.tests.teacher_folders import copy_systems
from studies.uncertainty import Labelled, Spread, committees_of, main, measure, verdict
from tests.pruning.search_helpers import save_tiny


def members(count: int, shared: float, frames: int = 2000) -> list[Labelled]:
    """Members whose errors are of a size that differs by frame, and a part that all have in common."""
    random = np.random.default_rng(0)
    size = random.uniform(0.05, 1.0, frames)
    common = shared * random.normal(size=frames)
    free = np.ones(frames, dtype=int)
    sid = np.array([f"s{number // 4}" for number in range(frames)])
    found = []
    centre = random.normal(size=frames)
    labels = centre + size * random.normal(size=frames)  # as one more member, without the common part
    for _ in range(count):
        values = centre + common + size * random.normal(size=frames)
        forces = np.stack([np.zeros((frames, 3)), np.tile(values - labels, (3, 1)).T], axis=1)
        found.append(Labelled(sid, np.stack([labels, values], axis=1), free, forces, free))
    return found


def test_without_a_common_error_the_interval_holds_what_it_says() -> None:
    result = measure(members(4, 0.0), {})["all"]
    assert result["energy"]["coverage"] == pytest.approx(0.9, abs=0.03)
    assert result["energy"]["factor"] == pytest.approx(1.0, abs=0.15)
    assert result["energy"]["coverage_after_stretching"] == pytest.approx(0.9, abs=0.04)
    assert result["energy"]["rank_correlation"] > 0.3
    low, high = result["energy"]["rank_correlation_90"]
    assert low < result["energy"]["rank_correlation"] < high
    assert "holds by these measures" in verdict("seeds", "energy", result["energy"])
    assert result["forces"]["coverage"] == pytest.approx(result["energy"]["coverage"])  # three times the same


def test_a_common_error_is_not_seen_and_is_said() -> None:
    row = measure(members(4, 5.0), {})["all"]["energy"]
    assert row["coverage"] < 0.6
    assert row["shared"] > 0.9
    assert abs(row["rank_correlation"]) < 0.3
    said = verdict("twins", "energy", row)
    for part in ("too narrow, by a factor", "does not tell large errors", "common to all members"):
        assert part in said


def test_committees_need_members() -> None:
    with pytest.raises(InputError, match="give --seeds"):
        committees_of([], [])
    with pytest.raises(InputError, match="give --seeds"):
        committees_of(["oc20_small", "oc20_small"], [])
    found = committees_of([], ["oc20_small"])
    assert [kind for _, kind in found["twins"]] == ["float32", "bf16"]
    one = members(1, 0.0, 20)
    with pytest.raises(InputError, match="at least two members"):
        Spread.of(one)


def test_the_study_goes_on_and_writes_its_page(tmp_path: Path) -> None:
    folder = copy_systems(tmp_path / "test", ["tn1000101", "tm300016"])
    full = save_tiny(tmp_path / "full.pt")
    arguments = ["--twins", str(full), "--data", str(folder), "--runs", str(tmp_path / "runs")]
    arguments += ["--results", str(tmp_path / "results" / "uncertainty")]
    main(arguments)
    record = json.loads((tmp_path / "results" / "uncertainty.json").read_text())
    (committees,) = record["data"].values()
    row = committees["twins"]["all"]["energy"]
    assert (committees["twins"]["members"], row["systems"]) == (2, 2)
    assert row["mean_spread"] > 0
    page = (tmp_path / "results" / "uncertainty.md").read_text()
    assert "twins, energy:" in page
    assert (tmp_path / "results" / "uncertainty.png").stat().st_size > 5000
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(kept) == 2
    main(arguments)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}

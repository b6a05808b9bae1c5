"""Work and quality of searches: the table from given rows, and a tiny comparison from end to end."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from equiformer2.checkpoint import load_checkpoint
from equiformer2.files import read_json
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.calibration_data import read_structures
from equiformer2.pruning.routing import RoutedModel, ScheduleObjective, search_schedule
from studies.exhaustive_schedules import ExhaustiveSearch
from studies.search_cost import markdown, static_router, summary

FOLDER = Path(__file__).parents[2]


def row(kind: str, seed: int, passes: float, loss: float) -> dict[str, Any]:
    errors = {"loss": loss, "force_mae": loss / 2}
    return {
        "search": "plan",
        "kind": kind,
        "seed": seed,
        "passes": passes,
        "passes_without_savings": 2 * passes,
        "candidates": 10,
        "keep": 0.7,
        "structures": 32,
        "held_out_structures": 64,
        "parameters": 1_000_000,
        "macs": 0.7,
        "cpu_seconds": 1.0,
        "calibration": errors,
        "held_out": errors,
    }


def test_searches_are_compared_seed_by_seed() -> None:
    rows = [row("exhaustive", seed, 500.0, 0.10 + 0.02 * seed) for seed in range(3)]
    rows += [row("default", seed, 100.0, 0.11 + 0.02 * seed + 0.01 * (seed == 2)) for seed in range(3)]
    rows += [row("default", 7, 1.0, 9.0)]  # no pair; not compared
    found = summary(rows)["plan"]
    assert found["seeds"] == [0, 1, 2]
    assert found["times_less_work"] == pytest.approx(1000 / 100)
    change = found["held_out_difference"]
    assert change["mean"] == pytest.approx(0.04 / 3)
    assert change["standard_error"] == pytest.approx(0.01 / 3)
    page = markdown({"plan": found})
    assert "32 calibration structures and 64 of other systems" in page
    assert "10.0 times the work" in page
    assert "default minus exhaustive: +0.0133 eV (± 0.0033, standard error)" in page


@pytest.mark.slow
def test_a_comparison_is_continued(tmp_path: Path) -> None:
    """Both searches of one seed with the shipped network on two structures, then nothing is left to do."""

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        words = ["--checkpoint", "models/oc20_small.pt", "--data", "data/oc20_trajs/random1000100.extxyz.xz"]
        words += ["--held-out", "data/oc20_trajs/random1000103.extxyz.xz", "--structures", "2"]
        words += ["--held-out-structures", "1", "--keep", "0.97", "--seeds", "0", "--out", str(tmp_path)]
        words += ["--searches", "plan"]
        return subprocess.run(
            [sys.executable, "-m", "studies.search_cost", *words, "--results", str(tmp_path / "page"), *more],
            cwd=FOLDER,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )

    first = run()
    assert first.returncode == 0, first.stderr
    rows = {kind: read_json(tmp_path / f"plan-{kind}-0.json") for kind in ("exhaustive", "default")}
    assert all(found["macs"] <= 0.97 for found in rows.values())
    assert rows["default"]["passes"] < rows["exhaustive"]["passes_without_savings"]
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("plan-*"))]
    assert run().returncode == 0
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("plan-*"))] == times
    other = run("--keep", "0.96")
    assert other.returncode == 2
    assert "is of another network, target or data" in other.stderr


@pytest.mark.slow
def test_routers_without_savings_and_with_them() -> None:
    """Two generations on two structures of the shipped network, at the same share of the operations."""
    checkpoint = load_checkpoint("models/oc20_small.pt")
    model = checkpoint.model.eval()
    structures = read_structures(["data/oc20_trajs/random1000100.extxyz.xz"], 2)
    calibration = Calibration(model, checkpoint.normalizers, structures, 1)
    objective = ScheduleObjective(model, calibration, static_router)
    options = {"population": 6, "generations": 2, "seed": 0}
    whole = ExhaustiveSearch(objective, 4, 0.7, **options).run()  # type: ignore[arg-type]
    quick = search_schedule(objective, 4, 0.7, **options)  # type: ignore[arg-type]
    for found in (whole, quick):
        assert 0.68 <= found.macs <= 0.7
        routed = RoutedModel(model, static_router(found.levels))
        assert found.loss == pytest.approx(calibration.loss(routed))
        assert list(found.history) == sorted(found.history, reverse=True)
    # Every schedule on both structures.
    assert 2 * 0.5 * whole.evaluations < whole.passes < 2 * whole.evaluations
    assert quick.passes < 0.6 * whole.passes

"""The pages in docs/results are what their scripts write from the results files beside them."""

import re
import runpy
from collections.abc import Callable
from typing import Any

import pytest
from figures import content_of
from pages import ROOT

from benchmarks.benchmark_report import markdown as benchmark_page
from equiformer2.pruning.analysis.pareto_report import markdown as study_table
from equiformer2.training.learning_curve import SystemErrors, Validation
from equiformer2.training.learning_curve import markdown as learning_page
from studies.study_report import _lossless_table, _speed_table, _verdict_table
from studies.v3_report import markdown as v3_page
from studies.verdicts import Verdict


def _benchmark(data: Any) -> list[str]:
    pictures = ["benchmark_cpu", "benchmark_cpu_atoms", "benchmark_cpu_training_atoms"]
    return [benchmark_page(data, "benchmark_cpu", pictures)]


def _equivariance(data: Any) -> list[str]:
    script = runpy.run_path(str(ROOT / "benchmarks/measure_equivariance.py"))
    seeds, trials = re.findall(r"--\w+ (\d+)", data["command"])
    rows = [row | {"grid": tuple(row["grid"])} for row in data["rows"]]
    return [script["markdown"](rows, int(seeds), int(trials))]


def _small(data: Any) -> list[str]:
    runs = {name: [Validation(**v) for v in found] for name, found in data["runs"].items()}
    systems = {
        name: {sid: SystemErrors(**item) for sid, item in found.items()}
        for name, found in data["systems"].items()
    }
    return [learning_page(runs, systems, "oc20_small.png")]


def _v3(data: Any) -> list[str]:
    return [v3_page(data["summary"], data["runs"], "v3_comparison.png")]


def _study(data: Any) -> list[str]:
    """The parts that need no more than the results; what was planned is in the configuration."""
    tables = [study_table(rows, times=False) for rows in data["studies"].values()]
    verdicts = [Verdict(**verdict) for verdict in data["verdicts"]]
    lists = (_verdict_table(verdicts), _lossless_table(data["lossless"]), _speed_table(data["speed"]))
    return [*tables, *("\n".join(lines).strip() for lines in lists)]


PAGES: dict[str, Callable[[Any], list[str]]] = {
    "benchmark_cpu": _benchmark,
    "equivariance": _equivariance,
    "oc20_small": _small,
    "pruning_study": _study,
    "v3_comparison": _v3,
}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_what_the_results_say(name: str) -> None:
    page = (ROOT / f"docs/results/{name}.md").read_text(encoding="utf-8")
    for part in PAGES[name](content_of(f"docs/results/{name}.json")):
        wanted, there = part.strip().split("\n"), page.split("\n")
        missing = [line for line in wanted if line not in there]
        assert not missing, f"docs/results/{name}.md lacks {missing[:3]}"
        assert part.strip() in page, f"docs/results/{name}.md has these lines in another order"


def test_counted_costs_are_those_of_the_page() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks/kernel_costs.py"))
    page = (ROOT / "docs/results/kernel_costs.md").read_text(encoding="utf-8")
    assert script["markdown"](["31M", "83M", "153M"], 8) == page

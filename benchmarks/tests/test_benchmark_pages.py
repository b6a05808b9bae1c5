"""Pages in docs/results are what benchmarks write from the results files beside them."""

import json
import re
from pathlib import Path

from benchmarks import measure_equivariance
from benchmarks.benchmark_report import markdown

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_page_of_the_benchmark() -> None:
    data = json.loads((RESULTS / "benchmark_cpu.json").read_text(encoding="utf-8"))
    pictures = ["benchmark_cpu", "benchmark_cpu_atoms", "benchmark_cpu_training_atoms"]
    page = (RESULTS / "benchmark_cpu.md").read_text(encoding="utf-8")
    assert markdown(data, "benchmark_cpu", pictures).strip() in page


def test_page_of_equivariance() -> None:
    data = json.loads((RESULTS / "equivariance.json").read_text(encoding="utf-8"))
    seeds, trials = map(int, re.findall(r"--\w+ (\d+)", data["command"]))
    rows = [row | {"grid": tuple(row["grid"])} for row in data["rows"]]
    page = (RESULTS / "equivariance.md").read_text(encoding="utf-8")
    assert measure_equivariance.markdown(rows, seeds, trials).strip() in page

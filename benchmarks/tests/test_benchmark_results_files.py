"""Results of benchmarks: pages follow from the files beside them, and no input is replaced."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import compare_loss_curves, measure_batches, measure_equivariance
from benchmarks.benchmark_report import markdown
from equiformer2.errors import InputError

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


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (measure_batches, ("--data", "there.lmdb", "--json", "there.lmdb")),
        (compare_loss_curves, ("--data", "there.json", "--out", "there")),
    ],
)
def test_results_do_not_replace_the_input(
    program: ModuleType, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there.lmdb", "there.json"):
        Path(name).write_text("keep")
    with pytest.raises(InputError, match=r"is read as input \(there\..* and would be replaced"):
        program.main(arguments)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"keep"}

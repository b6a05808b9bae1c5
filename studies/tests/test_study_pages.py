"""Pages in docs/results are what studies write from the results files beside them."""

import json
from pathlib import Path

from equiformer2.pruning.analysis.pareto_report import markdown as pareto_table
from studies import compare_v3, study_errors
from studies.campaign import OTHER_METHODS
from studies.study_report import _lossless_table, _own_study, _speed_table, _verdict_table
from studies.verdicts import Verdict

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_page_of_the_pruning_study() -> None:
    """Parts that need no more than the results; what was planned is in the configuration."""
    data = json.loads((RESULTS / "pruning_study.json").read_text(encoding="utf-8"))
    verdicts = [Verdict(**verdict) for verdict in data["verdicts"]]
    tables = (_verdict_table(verdicts), _lossless_table(data["lossless"]), _speed_table(data["speed"]))
    parts = [pareto_table(rows, times=False) for rows in data["studies"].values()]
    page = (RESULTS / "pruning_study.md").read_text(encoding="utf-8")
    for part in [*parts, *("\n".join(lines) for lines in tables)]:
        assert part.strip() in page


def test_page_of_the_study_network_takes_in_other_methods() -> None:
    page = (RESULTS / "pruning_study_teacher.md").read_text(encoding="utf-8")
    for study, what in OTHER_METHODS.items():
        assert "\n".join(_own_study(RESULTS, study, what)).strip() in page


def test_page_of_the_comparison_with_v3() -> None:
    data = json.loads((RESULTS / "v3_comparison.json").read_text(encoding="utf-8"))
    page = (RESULTS / "v3_comparison.md").read_text(encoding="utf-8")
    assert compare_v3.markdown(data["summary"], data["runs"], "v3_comparison.png").strip() in page


def test_page_of_the_errors_on_the_teacher_set() -> None:
    data = json.loads((RESULTS / "study_errors.json").read_text(encoding="utf-8"))
    page = (RESULTS / "study_errors.md").read_text(encoding="utf-8")
    assert page == study_errors.markdown(data, "study_errors.png")

"""Pages in docs/results are what studies write from the results files beside them."""

import json
import shutil
from pathlib import Path

import pytest

from equiformer2.errors import InputError
from equiformer2.pruning.analysis.pareto_report import markdown as pareto_table
from studies import compare_v3, study_errors
from studies.campaign import OTHER_METHODS, read_campaign
from studies.study_report import (
    _lossless_table,
    _own_study,
    _speed_table,
    _verdict_table,
    renew_other_methods,
)
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


def test_sections_of_other_studies_are_renewed_alone(tmp_path: Path) -> None:
    campaign = read_campaign(Path("configs/pruning/study_teacher.yaml"))
    with pytest.raises(InputError, match="write it with --parts report"):
        renew_other_methods(campaign, tmp_path)
    names = [f"{study}.{ending}" for study in OTHER_METHODS for ending in ("md", "json")]
    for name in ["pruning_study_teacher.md", *(name for name in names if (RESULTS / name).exists())]:
        shutil.copy(RESULTS / name, tmp_path / name)
    before = (tmp_path / "pruning_study_teacher.md").read_text(encoding="utf-8")
    assert renew_other_methods(campaign, tmp_path).read_text(encoding="utf-8") == before
    (tmp_path / "adapters.md").write_text("# Adapters\n\nA new table.\n", encoding="utf-8")
    (tmp_path / "adapters.json").write_text('{"command": "the command", "commit": "abc"}', encoding="utf-8")
    after = renew_other_methods(campaign, tmp_path).read_text(encoding="utf-8")
    assert "\n# Adapters\n\nFrom `the command`, commit abc.\n\nA new table.\n" in after
    kept = [line for line in before.splitlines() if line not in after.splitlines()]
    assert all("studies.adapters" in line for line in kept)
    (tmp_path / "pruning_study_teacher.md").write_text("# Something else\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no section"):
        renew_other_methods(campaign, tmp_path)


def test_page_of_the_comparison_with_v3() -> None:
    data = json.loads((RESULTS / "v3_comparison.json").read_text(encoding="utf-8"))
    page = (RESULTS / "v3_comparison.md").read_text(encoding="utf-8")
    assert compare_v3.markdown(data["summary"], data["runs"], "v3_comparison.png").strip() in page


def test_page_of_the_errors_on_the_teacher_set() -> None:
    data = json.loads((RESULTS / "study_errors.json").read_text(encoding="utf-8"))
    page = (RESULTS / "study_errors.md").read_text(encoding="utf-8")
    assert page == study_errors.markdown(data, "study_errors.png")

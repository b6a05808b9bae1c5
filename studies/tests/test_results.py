"""Results of runs: kept once, taken from the published page, refused where they are of other settings."""

from pathlib import Path
from typing import Any

import pytest

from equiformer2.errors import InputError
from studies.results import Results, write_page


def about(run: str) -> dict[str, Any] | None:
    return None if run == "gone" else {"steps": 10}


def test_a_fresh_clone_takes_results_from_the_page(tmp_path: Path) -> None:
    page, first = tmp_path / "page.md", Results(tmp_path / "first", about)
    with pytest.raises(InputError, match="no finished run"):
        first.all()
    row = first.keep("a", {"error": 0.5})
    gone = {"run": "gone", "about": {"steps": 10}}
    write_page(page, [row, gone], "text")
    clone = Results(tmp_path / "clone", about, page)
    assert clone.get("a") == row
    assert clone.get("gone") is None
    assert clone.all() == [row]


def test_a_page_of_other_settings_is_not_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_page(page, [Results(tmp_path / "first", about).keep("a", {"error": 0.5})], "text")
    with pytest.raises(InputError, match="has a with other settings: name another page"):
        Results(tmp_path / "second", lambda _: {"steps": 20}, page)


def test_an_own_file_comes_first_and_must_be_of_the_same_settings(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_page(page, [Results(tmp_path / "first", about).keep("a", {"error": 0.5})], "text")
    results = Results(tmp_path / "runs", about, page)
    results.keep("a", {"error": 0.4})
    assert [row["error"] for row in results.all()] == [0.4]
    with pytest.raises(InputError, match="of other settings"):
        Results(tmp_path / "runs", lambda _: {"steps": 20}).get("a")

"""Results of several runs are merged; what is complete is not measured again."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.benchmark_results import package_digest
from benchmarks.tests.conftest import make_store, run_all
from datasets_oc20 import DataError
from equiformer2.errors import InputError

KEY = {"repeats": 3}


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    first = make_store(tmp_path)
    first.hold()
    with pytest.raises(DataError, match="another process is writing here"):
        make_store(tmp_path).hold()


def test_what_is_complete_is_not_measured_again(tmp_path: Path, log: list[Any]) -> None:
    run_all(make_store(tmp_path), tmp_path, log=log, batches=("B1",))
    asked = len(log)
    assert asked > 0
    run_all(make_store(tmp_path), tmp_path, log=log, batches=("B1",))
    assert len(log) == asked
    run_all(make_store(tmp_path, force=True), tmp_path, log=log, batches=("B1",))
    assert len(log) == 2 * asked


def test_other_settings_are_measured_again(tmp_path: Path, log: list[Any]) -> None:
    run_all(make_store(tmp_path), tmp_path, log=log, parts=("timings",), batches=("B1",))
    asked = len(log)
    run_all(make_store(tmp_path), tmp_path, log=log, parts=("timings",), batches=("B1",), repeats=4)
    assert len(log) > asked


def test_parts_and_sizes_are_merged(tmp_path: Path) -> None:
    run_all(make_store(tmp_path), tmp_path, batches=("B1",))
    run_all(make_store(tmp_path), tmp_path, parts=("breakdown",), sizes=("83M",), batches=("B1",))
    content = make_store(tmp_path).content
    assert set(content["units"]) == {"memory/31M/B1", "timings/31M/B1/default", "breakdown/83M/B1"}
    assert {name: unit["run"] for name, unit in content["units"].items()} == {
        "memory/31M/B1": 0,
        "timings/31M/B1/default": 0,
        "breakdown/83M/B1": 1,
    }


@pytest.mark.parametrize("change", ["package", "processor", "settings"])
def test_another_package_machine_or_setting_is_another_measurement(tmp_path: Path, change: str) -> None:
    first = make_store(tmp_path)
    first.put("memory/31M/B1", KEY, {"value": 1})
    assert make_store(tmp_path).complete("memory/31M/B1", KEY)
    store = make_store(tmp_path, **({"processor": "c"} if change == "processor" else {}))
    if change == "package":
        store.package = "other"
    key = {"repeats": 4} if change == "settings" else KEY
    assert not store.complete("memory/31M/B1", key)
    assert store.find("memory/31M/B1") == {"value": 1}


def test_a_run_that_measured_nothing_that_is_kept_is_forgotten(tmp_path: Path) -> None:
    for value in range(3):
        make_store(tmp_path, force=True).put("memory/31M/B1", KEY, {"value": value})
    make_store(tmp_path).put("timings/31M/B1", KEY, {"value": 3})
    content = json.loads((tmp_path / "benchmark_cpu.json").read_text())
    assert len(content["runs"]) == 2
    assert [unit["run"] for unit in content["units"].values()] == [0, 1]


def test_a_file_of_the_first_format_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "benchmark_cpu.json").write_text('{"timings": []}')
    assert make_store(tmp_path).content["units"] == {}
    (tmp_path / "benchmark_cpu.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        make_store(tmp_path)


def test_digest_changes_with_the_package(tmp_path: Path) -> None:
    (tmp_path / "equiformer2").mkdir()
    file = tmp_path / "equiformer2" / "model.py"
    file.write_text("x = 1\n")
    before = package_digest(tmp_path)
    assert before == package_digest(tmp_path)
    file.write_text("x = 2\n")
    assert package_digest(tmp_path) != before

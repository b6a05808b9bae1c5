"""Order of the measurements and what they leave out."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.answer_comparison import Comparison
from benchmarks.benchmark_context import Benchmark
from benchmarks.benchmark_results import fit_line, records
from benchmarks.part_atoms import extrapolate
from benchmarks.tests.conftest import make_settings, make_store, measured
from benchmarks.worker_session import BenchmarkError

Log = list[tuple[str, dict[str, Any]]]


def calls(log: Log, *operations: str) -> list[tuple[str, ...]]:
    """Worker and task of every request, in order."""
    return [
        (name, request["operation"], request.get("precision", "float32"))
        for name, request in log
        if request["command"] == "run" and request["operation"] in operations
    ]


def test_calls_alternate_after_one_warm_up(tmp_path: Path, log: Log) -> None:
    measured(tmp_path, log=log, batches=("B1",))
    turn = [
        (name, operation, "float32")
        for name, operation in (
            ("reference", "forward"),
            ("reference", "forward_as_shipped"),
            ("ours", "forward"),
        )
    ]
    assert calls(log, "forward", "forward_as_shipped") == turn * 4


def test_variants_take_turns_with_the_reference_in_float32(tmp_path: Path, log: Log) -> None:
    content = measured(tmp_path, log=log, parts=("timings",), batches=("B1",), precisions=("float32", "bf16"))
    names = [("reference", "float32"), ("reference", "float32"), ("ours", "float32"), ("ours", "bf16")]
    asked = calls(log, "forward", "forward_as_shipped")
    assert [(name, precision) for name, _, precision in asked] == names * 4
    # On a CPU there is no training in bf16.
    assert ("ours", "training_step", "bf16") not in calls(log, "training_step")
    (record,) = records(content, "timings")
    assert [found["variant"] for found in record["deviations"]] == ["bf16"]


def test_on_a_gpu_tf32_is_for_both_and_bf16_trains(tmp_path: Path, log: Log) -> None:
    measured(
        tmp_path,
        log=log,
        parts=("timings",),
        batches=("B1",),
        device="cuda",
        precisions=("float32", "tf32", "bf16"),
    )
    steps = set(calls(log, "training_step"))
    expected = {("reference", "float32"), ("reference", "tf32")}
    expected |= {("ours", "float32"), ("ours", "tf32"), ("ours", "bf16")}
    assert {(name, precision) for name, _, precision in steps} == expected


def test_a_backend_that_is_refused_is_left_out_and_named(tmp_path: Path, log: Log) -> None:
    content = measured(tmp_path, log=log, batches=("B1",), backends=("auto", "compile"))
    for part in ("memory", "timings"):
        (record,) = records(content, part)
        assert any("compile" in reason and "no such backend" in reason for reason in record["left_out"])
    assert not [call for call in records(content, "timings")[0]["calls"] if call["backend"] == "compile"]


def test_what_does_not_fit_is_left_out_and_named(tmp_path: Path, log: Log) -> None:
    content = measured(tmp_path, log=log)
    # 300 atoms at 0.1 GiB each: more than 24 GiB; the forward without its autograd graph remains.
    timed = {
        (row["batch"], call["operation"])
        for row in records(content, "timings")
        for call in row["calls"]
        if call["implementation"] == "reference"
    }
    assert timed == {
        ("B1", "forward"),
        ("B1", "forward_as_shipped"),
        ("B1", "training_step"),
        ("B4", "forward"),
    }
    second = records(content, "memory")[1]
    assert [peak["implementation"] for peak in second["peaks"]] == ["ours"]
    reasons = records(content, "timings")[1]["left_out"]
    assert any("B4 training step" in reason for reason in reasons)


def test_different_answers_end_the_run(tmp_path: Path) -> None:
    bench = Benchmark(make_settings(), make_store(tmp_path), tmp_path, lambda: None, lambda line: None)
    with pytest.raises(BenchmarkError, match="forces; nothing was timed"):
        bench.judge("31M B1", [Comparison("forces", 0.1, 0.0, 0.01, 1.0)])


def test_relaxation_steps_alternate(tmp_path: Path, log: Log) -> None:
    content = measured(tmp_path, log=log, parts=("relaxation",), precisions=("float32", "bf16"))
    turn = [("reference", "float32"), ("ours", "float32"), ("ours", "bf16")]
    asked = calls(log, "relaxation_step")
    assert [(name, precision) for name, _, precision in asked] == turn * 4
    (record,) = records(content, "relaxation")
    assert record["atoms"] == 73


def test_precision_uses_the_trained_network_where_there_is_one(tmp_path: Path, log: Log) -> None:
    content = measured(
        tmp_path, log=log, parts=("precision",), sizes=("31M", "small"), precisions=("float32", "bf16")
    )
    assert [row["trained"] for row in records(content, "precision")] == [False, True]
    loaded = [request["checkpoint"] for _, request in log if request["command"] == "load"]
    assert [Path(path).name for path in loaded] == ["oc20_small.pt"]


def test_parts_of_ours_alone_need_no_reference(tmp_path: Path, log: Log) -> None:
    content = measured(tmp_path, log=log, parts=("precision", "breakdown", "atoms"), reference_python=None)
    assert {name for name, _ in log} == {"ours"}
    assert {row["implementation"] for row in records(content, "atoms")} == {"ours"}


def test_every_point_of_atoms_has_a_process_of_its_own(tmp_path: Path, log: Log) -> None:
    content = measured(tmp_path, log=log, parts=("atoms",), max_seconds=2.0)
    points = {(row["implementation"], row["atoms"]): row for row in records(content, "atoms")}
    # 10 ms per atom: 1,152 atoms are expected to take 11.5 s. The reference ends here, ours goes on.
    assert "seconds" not in points["reference", 1152]
    assert "more than 2 s" in points["reference", 1152]["left_out"][0]
    assert [atoms for name, atoms in points if name == "ours"] == [16, 144, 1152]
    built = [request["batch"] for name, request in log if request["command"] == "build" and name == "ours"]
    assert built == ["atoms-16", "atoms-144", "atoms-1152", "atoms-16"]  # the last one compares answers


def test_training_against_atoms_takes_training_steps(tmp_path: Path, log: Log) -> None:
    content = measured(tmp_path, log=log, parts=("training_atoms",), atoms=(16, 150))
    run = {request["operation"] for _, request in log if request["command"] == "run"}
    assert run == {"training_step"}
    assert [row["atoms"] for row in records(content, "training_atoms")] == 2 * [16, 144]
    assert not records(content, "atoms")


def test_a_process_that_dies_ends_its_series_only(tmp_path: Path, log: Log) -> None:
    content = measured(tmp_path, log=log, parts=("atoms",), atoms=(16, 1200, 2500))
    points = {(row["implementation"], row["atoms"]): row for row in records(content, "atoms")}
    assert "was killed" in points["reference", 1152]["left_out"][0]
    assert ("reference", 2496) not in points
    assert "seconds" in points["ours", 2496]


def test_extrapolation_follows_the_last_two_points() -> None:
    assert extrapolate([], 10) == 0.0
    assert extrapolate([(10, 3.0)], 20) == pytest.approx(6.0)
    # Quadratic growth stays quadratic; less than proportional growth counts as proportional.
    assert extrapolate([(10, 1.0), (20, 4.0)], 40) == pytest.approx(16.0)
    assert extrapolate([(10, 1.0), (20, 1.1)], 40) == pytest.approx(2.2)


def test_fitted_line() -> None:
    slope, intercept = fit_line([(10, 25.0), (20, 45.0), (40, 85.0)])
    assert (slope, intercept) == (pytest.approx(2.0), pytest.approx(5.0))
    with pytest.raises(ValueError, match="two points"):
        fit_line([(10, 1.0), (10, 2.0)])


def test_a_batch_that_may_not_fit_is_judged_by_an_earlier_run(tmp_path: Path, log: Log) -> None:
    measured(tmp_path, log=log, parts=("memory",), batches=("B1",))
    # Asked for alone, and the timings before the memory.
    content = measured(tmp_path, log=log, parts=("timings",), batches=("B4",))
    assert ("reference", "training_step", "float32") not in calls(log, "training_step")[2 * 2 :]
    assert any(
        "would need about 31 GiB" in reason
        for reason in content["units"]["memory/31M/B4"]["record"]["left_out"]
    )

"""Tables and verdicts that benchmarks/measure_checkpointing.py makes of its measurements."""

from typing import Any

import pytest
import torch

from benchmarks import measure_checkpointing
from benchmarks.measure_checkpointing import compared, expected_peak, in_fresh_process, sentences


def record(way: str, peak: int, batch: str = "B1", **more: Any) -> dict[str, Any]:
    known = {"size": "toy", "atoms": 70, "before_step": 100, "gradients": "ab"}
    return {**known, "batch": batch, "way": way, "peak": peak, **more}


def test_shares_are_of_the_peaks_without() -> None:
    records = [record("stored", 1100), record("kernels", 600), record("checkpointed", 330)]
    (row,) = compared([*records, record("kernels", 900, "B4")])  # nothing to compare B4 with
    assert row["peak_of_stored"] == pytest.approx(0.30)
    assert row["peak_of_kernels"] == pytest.approx(0.55)
    assert row["step_of_kernels"] == pytest.approx(0.46)
    assert sentences(row) == [
        "toy B1: peak memory with activation checkpointing is 30.0 % of that without, "
        "every intermediate stored (23.0 % of what the step adds)",
        "toy B1: peak memory with activation checkpointing is 55.0 % of that without, "
        "default kernels (46.0 % of what the step adds)",
        "toy B1: gradients equal",
    ]


def test_other_gradients_are_said() -> None:
    (row,) = compared([record("kernels", 600), record("checkpointed", 330, gradients="cd")])
    assert sentences(row)[-1] == "toy B1: gradients DIFFER"
    assert len(sentences(row)) == 2


def test_the_forecast_grows_with_the_atoms() -> None:
    records = [record("kernels", 600), record("checkpointed", 330)]
    assert expected_peak(records, "toy", 280, "kernels") == 100 + 4 * 500
    assert expected_peak(records, "toy", 280, "stored") == 0.0
    assert expected_peak(records, "83M", 280, "kernels") == 0.0


def test_the_figures_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = {"kernels": 600, "checkpointed": 150}

    def made_up(function: Any, size: str, batch: str, way: str, threads: int) -> dict[str, Any] | None:
        return record(way, peaks[way], kept_by_forward=50) if way in peaks else None

    measure_checkpointing.main(["--sizes", "toy", "--batches", "B1"], made_up)
    printed = capsys.readouterr().out.splitlines()
    assert "toy B1 stored: needs more than the" in printed[0]
    assert "25.0 % of that without, default kernels" in printed[-2]


def test_what_does_not_fit_is_no_record() -> None:
    assert in_fresh_process(torch.zeros, 1 << 55) is None  # 128 PiB: torch's own error
    with pytest.raises(RuntimeError, match="shape"):
        in_fresh_process(torch.zeros(6).view, 4)

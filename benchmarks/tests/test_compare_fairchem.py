"""The script's options."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare_fairchem as benchmark
from benchmarks.benchmark_settings import Variant
from equiformer2.errors import InputError


def settings(*arguments: str) -> Any:
    return benchmark.make_settings(
        benchmark.parse_arguments([*arguments, "--reference-python", sys.executable])
    )


def test_the_default_is_what_make_benchmark_measures() -> None:
    default = settings()
    assert default.parts == ("memory", "timings")
    assert default.sizes == ("31M", "83M")
    assert default.batches == ("B1", "B4")
    assert (default.repeats, default.threads, default.device) == (5, 2, "cpu")
    assert default.variants() == [Variant("float32", "auto")]


def test_quick_changes_only_what_is_not_asked_for() -> None:
    quick, chosen = settings("--quick"), settings("--quick", "--sizes", "small")
    assert (quick.sizes, quick.batches, quick.repeats) == (("31M",), ("B1",), 1)
    assert (chosen.sizes, chosen.batches, chosen.repeats) == (("small",), ("B1",), 1)


def test_the_command_of_the_report_asks_for_the_same() -> None:
    asked = settings("--parts", "atoms,timings", "--precisions", "float32,bf16", "--atoms", "16,32")
    again = benchmark.command(asked).split()
    assert again[:2] == ["python", "scripts/benchmark.py"]
    assert settings(*again[2:]) == asked


def test_on_a_gpu_all_precisions_are_measured() -> None:
    asked = settings("--device", "cuda")
    assert asked.precisions == ("float32", "tf32", "bf16")
    assert asked.reference_precisions() == ("float32", "tf32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "speed"], "known are memory"),
        (["--precisions", "bf16"], "needs float32"),
        (["--precisions", "float32,tf32"], "on a GPU only"),
        (["--backends", "compile"], "--backends auto"),
        (["--device", "cuda", "--allocators", "no-mmap"], "--allocators"),
        (["--repeats", "0"], "at least 1"),
        (["--atoms", "10,many"], "whole numbers"),
        (["--atoms", "0"], "at least 1"),
        (["--max-seconds", "nan"], "above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(*arguments)


def test_the_reference_is_needed_by_the_parts_that_compare(tmp_path: Path) -> None:
    missing = ["--reference-python", str(tmp_path / "python")]
    with pytest.raises(InputError, match="make benchmark"):
        benchmark.make_settings(benchmark.parse_arguments(missing))
    alone = benchmark.parse_arguments([*missing, "--parts", "breakdown,precision,atoms"])
    assert benchmark.make_settings(alone).reference_python is None

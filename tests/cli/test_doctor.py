"""Command `doctor`: its record, its remedies, and its exit status."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from equiformer2.cli.doctor import ANSWERS, PACKAGES, TOLERANCE, differences
from equiformer2.kernels.cpu.library import Compiler
from tests.cli.command_line import run_command

FAILING = '#!/bin/sh\ncase "$*" in *--version*) echo "cc 1";; *) echo "out of space" >&2; exit 1;; esac\n'


def doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON document of `equiformer2 doctor --json`."""
    status = run_command("doctor", "--json")
    return status, json.loads(capsys.readouterr().out)


def check(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The one check of this name."""
    (found,) = (check for check in record["checks"] if check["name"] == name)
    return found


def test_without_a_compiler_nothing_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, record = doctor(capsys)
    assert (status, record["ok"]) == (0, True)
    assert record["schema"].startswith("doctor/")
    assert set(PACKAGES) | {"python", "equiformer2"} == set(record["versions"])
    assert all(record["versions"].values())
    assert {"avx512_bf16", "amx"} <= {key for key, value in record["cpu"].items() if isinstance(value, bool)}
    kernels = {kernel["name"]: kernel for kernel in record["kernels"]}
    assert set(kernels) == {"torch", "cpp", "compile", "triton"}
    assert (kernels["torch"]["available"], kernels["torch"]["reason"]) == (True, None)
    assert (kernels["cpp"]["available"], kernels["compile"]["available"]) == (False, False)
    assert "g++" in kernels["cpp"]["reason"]
    assert "g++" in check(record, "CPU kernels")["remedy"]
    assert str(tmp_path) in check(record, "cache folder")["detail"]
    assert record["self_test"]["backends"] == ["torch"]
    assert record["self_test"]["max_force_difference_eV_A"] <= TOLERANCE


def test_a_compiler_that_fails_and_a_package_that_cannot_be_imported_are_faults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(FAILING)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "vesin", None)
    status = run_command("doctor")
    text = " ".join(capsys.readouterr().out.split())
    assert status == 3
    for part in ("out of space", "CXX=clang++", "pip install vesin", "self-test", "remedies"):
        assert part in text


def test_answers_that_differ_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    stored = json.loads(ANSWERS.read_text())
    assert max(differences(stored, "torch")) < TOLERANCE / 10
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]
    stored["forces_eV_A"][3][1] += 0.01
    stored["energy_eV"] -= 0.02
    energy, force = differences(stored, "torch")
    assert energy == pytest.approx(0.02, abs=1e-4)
    assert force == pytest.approx(0.01, abs=1e-4)


@pytest.mark.slow
def test_kernels_are_compiled_ahead(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if Compiler.find() is None:
        pytest.skip("no C++ compiler")
    status, record = doctor(capsys)
    assert (status, record["ok"]) == (0, True)
    assert record["self_test"]["backends"] == ["torch", "cpp"]
    assert record["self_test"]["max_force_difference_eV_A"] <= TOLERANCE
    assert len(list(Path(record["cache_folder"]).glob("kernels-*-bfloat16-*.so"))) >= 4

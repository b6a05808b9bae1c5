"""Timing of evaluations and trainings on a CPU: what is subtracted, what is written, what is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from ase.io import read

from benchmarks import measure_throughput
from datasets_oc20 import write_lmdb
from equiformer2.errors import InputError
from equiformer2.training.configuration import parse


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Words of the timed commands: a step takes 2 s with one process and 1 s with more, the start 7 s."""
    commands: list[list[str]] = []

    def time(words: Sequence[str], environment: Mapping[str, str], prefix: Sequence[str] = ()) -> float:
        commands.append([*words])
        trainer = parse(words[1:]).trainer
        return 7.0 + (2.0 if int(trainer["devices"]) == 1 else 1.0) * int(trainer["max_steps"])

    monkeypatch.setattr(measure_throughput, "_time_command", time)
    return commands


def test_training_counts_the_steps_alone(timed: list[list[str]], tmp_path: Path) -> None:
    target = tmp_path / "throughput.json"
    target.write_text(json.dumps({"loop": "kept"}))
    measure_throughput.main(
        ["--part", "training", "--data", "x.lmdb", "--steps=10", "--rounds=2", f"--json={target}"]
    )
    found = json.loads(target.read_text())
    assert found["loop"] == "kept"
    seconds = found["training"]["settings"]
    assert seconds == {"one process": [20, 20], "all threads": [20, 20], "2 processes": [10, 10]}
    assert found["training"]["structures"] == 40
    # Both take the same structures in a step.
    configs = [parse(words[1:]) for words in timed]
    assert {int(config.trainer["devices"]) * config.data["batch_size"] for config in configs} == {4}
    assert "2.00x" in measure_throughput.differences(found["training"]).splitlines()[-1]


def test_processes_that_cannot_share_a_step() -> None:
    with pytest.raises(InputError, match="--processes 3 cannot share steps of 4 structures"):
        measure_throughput.main(["--part", "training", "--data", "x.lmdb", "--processes", "3"])


def test_too_few_structures_and_a_command_that_fails(tmp_path: Path) -> None:
    data = tmp_path / "few.lmdb"
    write_lmdb(data, read("data/own_data/ch3_cu111.extxyz", index=":15"), energy_kind="total")
    with pytest.raises(InputError, match="has 15 structures: give --structures 15 or less"):
        measure_throughput.main(["--part", "calls", "--data", str(data), "--structures=16"])
    with pytest.raises(InputError, match=r"`equiformer2 evaluate` failed: .*no_such"):
        measure_throughput.main(
            ["--part", "calls", "--data", str(data), "--structures=15", "--checkpoint=no_such.pt"]
        )

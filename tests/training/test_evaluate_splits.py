"""`equiformer2 evaluate` over several splits: averages, error tables, what is kept after a stop, W&B."""

import json
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_script_file
from tiny_checkpoint import write_tiny_checkpoint
from torch_geometric.data import Batch, Data

from datasets_oc20 import LmdbWriter, OC20Lmdb
from equiformer2.training import evaluation
from equiformer2.training.breakdown import Breakdown, adsorbate_formula
from tests.observed import Call, observed


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "model.pt")


@pytest.fixture
def root(tmp_path: Path, lmdb_path: Path) -> Path:
    """Two splits of three frames; one as a folder of shards."""
    frames = OC20Lmdb(lmdb_path)
    folder = tmp_path / "oc20"
    for path, first in ((folder / "val_id" / "data.0000.lmdb", 0), (folder / "val_ood_ads.lmdb", 10)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with LmdbWriter(path, "adsorption") as writer:
            for index in range(first, first + 3):
                writer.write(frames[index])
    return folder


def without_time(report: dict[str, Any]) -> dict[str, Any]:
    """The record without its time and the words of its command."""
    return {key: value for key, value in report.items() if key not in ("seconds", "command")}


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """A process in the background of a shell is born with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_splits_their_average_and_going_on_after_a_stop(
    checkpoint: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, figures = tmp_path / "results.json", tmp_path / "figures"
    arguments = ("--checkpoint", checkpoint, "--data-root", root, "--splits", "val_id", "val_ood_ads")
    arguments += ("--out", out, "--batch_size", 2)

    def ctrl_c_in_the_second(calls: list[Call]) -> None:
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with observed(evaluation.evaluate, on_call=ctrl_c_in_the_second) as stopped:
        assert run_script_file("evaluate", *arguments) == 130
    assert not out.exists()
    with observed(evaluation.evaluate) as later:
        assert run_script_file("evaluate", *arguments, "--figures", figures) == 0
    # The first split was not evaluated again, and the result is as if nothing had happened.
    evaluated = [Path(call.arguments["dataset"].path).name for call in stopped + later]
    assert evaluated == ["val_id", "val_ood_ads.lmdb", "val_ood_ads.lmdb"]
    assert "val_id: 3 structures of 1 systems (finished before" in capsys.readouterr().out
    report = json.loads(out.read_text())
    again = tmp_path / "again.json"
    assert run_script_file("evaluate", *arguments[:-4], "--out", again, "--batch-size", 2) == 0
    assert without_time(json.loads(again.read_text())) == without_time(report)

    assert list(report["datasets"]) == ["val_id", "val_ood_ads"]
    for name, value in report["average"]["metrics"].items():
        both = [report["datasets"][split]["metrics"][name] for split in report["datasets"]]
        assert value == pytest.approx(np.mean(both)), name
    assert "average of 2" in capsys.readouterr().out
    for split in report["datasets"].values():
        (row,) = split["adsorbates"].values()
        assert row["structures"] == 3
        assert row["energy_mae"] == pytest.approx(split["metrics"]["energy_mae"])
        assert row["forces_mae"] == pytest.approx(split["metrics"]["forces_mae"], rel=1e-5)
    names = {path.name for path in figures.iterdir()}
    assert {"errors_by_adsorbate.png", "errors_by_element.png", "parity_energy_0_val_id.png"} <= names


def test_another_checkpoint_or_other_data_are_evaluated_again(
    checkpoint: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--checkpoint", checkpoint, "--data-root", root, "--splits", "val_id")
    arguments += ("--out", tmp_path / "results.json", "--overwrite")
    assert run_script_file("evaluate", *arguments) == 0
    state = torch.load(checkpoint, weights_only=True)
    state["normalizers"]["energy"]["mean"] = 5.0
    torch.save(state, checkpoint)
    assert run_script_file("evaluate", *arguments) == 0
    shard = root / "val_id" / "data.0000.lmdb"
    os.utime(shard, ns=(0, 0))
    assert run_script_file("evaluate", *arguments) == 0
    assert "finished before" not in capsys.readouterr().out
    assert run_script_file("evaluate", *arguments) == 0
    assert "finished before" in capsys.readouterr().out
    part = next((tmp_path / "results.parts").iterdir())
    for damaged in (b"not ours", part.read_bytes()[:300]):
        part.write_bytes(damaged)
        assert run_script_file("evaluate", *arguments) == 0
        assert "finished before" not in capsys.readouterr().out


def test_a_batch_without_targets_is_named(
    checkpoint: Path,
    lmdb_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "half.lmdb"
    with LmdbWriter(data, "adsorption") as writer:
        for index in range(4):
            record = OC20Lmdb(lmdb_path)[index]
            record.sid = f"system{index}"
            if index > 1:
                del record.forces
            writer.write(record)
    assert run_script_file("evaluate", "--checkpoint", checkpoint, "--data", data, "--batch_size", 2) == 2
    assert "(structure system2 has no forces)" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["json", "pkl"])
def test_adsorbates_by_name(
    checkpoint: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ending: str,
) -> None:
    sid = OC20Lmdb(root / "val_id")[0].sid
    names, out = tmp_path / f"names.{ending}", tmp_path / "results.json"
    if ending == "json":
        names.write_text(json.dumps({sid: "*COH"}))
    else:
        names.write_bytes(pickle.dumps({f"random{sid}": {"ads_symbols": "*COH", "miller_index": (1, 1, 1)}}))
    arguments = ("--checkpoint", checkpoint, "--data", root / "val_id", "--out", out, "--overwrite")
    arguments += ("--adsorbates", names)
    assert run_script_file("evaluate", *arguments) == 0
    assert list(json.loads(out.read_text())["all_datasets"]["adsorbates"]) == ["*COH"]
    names.write_bytes(pickle.dumps([os.system]) if ending == "pkl" else b"{}")
    assert run_script_file("evaluate", *arguments) == 2
    assert f"names.{ending}: the" in capsys.readouterr().err


def test_missing_splits_are_named(checkpoint: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script_file("evaluate", "--checkpoint", checkpoint, "--data-root", root) == 2
    assert "there are no data of val_ood_cat, val_ood_both" in capsys.readouterr().err


def test_errors_by_adsorbate_and_element() -> None:
    structures = [
        Data(
            pos=torch.zeros(3, 3),
            atomic_numbers=torch.tensor(numbers),
            tags=torch.tensor([0, 1, 2]),
            fixed=torch.tensor([True, False, False]),
            natoms=3,
            energy=torch.tensor([energy]),
            forces=torch.zeros(3, 3),
        )
        for numbers, energy in (([29, 29, 8], 1.0), ([29, 78, 8], 2.0), ([78, 78, 1], 0.0))
    ]
    batch = Batch.from_data_list(structures)
    forces = torch.zeros(9, 3)
    forces[0] = 50.0  # held
    forces[2], forces[4], forces[8] = 0.3, 0.6, 0.9
    prediction = {"energy": torch.tensor([1.1, 2.4, 0.01], dtype=torch.float64), "forces": forces}
    found, parts = Breakdown(), Breakdown()
    found.update(prediction, batch)
    adsorbates, elements = found.adsorbate_rows(), found.element_rows()
    assert list(adsorbates) == ["*O", "*H"]
    assert adsorbates["*O"]["energy_mae"] == pytest.approx(0.25)
    assert adsorbates["*O"]["forces_mae"] == pytest.approx((0.3 + 0.6) / 4)
    assert adsorbates["*O"]["adsorbate_forces_mae"] == pytest.approx(0.15)
    assert adsorbates["*H"]["energy_within_threshold"] == 1.0
    assert list(elements) == ["H", "O", "Cu", "Pt"]
    assert elements["Cu"]["structures"] == 2
    assert elements["Cu"]["free_atoms"] == 1
    assert elements["Cu"]["forces_mae"] == 0.0
    assert elements["Pt"]["forces_mae"] == pytest.approx(0.3)
    assert elements["Pt"]["energy_mae"] == pytest.approx((0.4 + 0.01) / 2)
    # CombinedTarget with itself, by way of the stored sums, nothing but the counts changes.
    parts.merge(found)
    parts.merge(Breakdown(**found.state()))
    assert parts.adsorbate_rows()["*O"]["structures"] == 4
    assert parts.adsorbate_rows()["*O"]["energy_mae"] == pytest.approx(0.25)


def test_adsorbates_are_named_by_formula() -> None:
    assert adsorbate_formula(np.array([29, 8, 6, 1]), np.array([0, 2, 2, 2])) == "*CHO"
    assert adsorbate_formula(np.array([29]), np.array([1])) == "(none)"


@pytest.mark.slow
def test_wandb_offline(checkpoint: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = ("--checkpoint", checkpoint, "--data-root", root, "--splits", "val_id")
    arguments += ("--out", tmp_path / "results.json", "--figures", tmp_path / "figures")
    arguments += ("--wandb-project", "project", "--wandb-offline")
    assert run_script_file("evaluate", *arguments) == 0
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 30
    while time.monotonic() < until and b"val_id/energy_mae" not in log.read_bytes():
        time.sleep(0.05)  # W&B's own process writes it
    content = log.read_bytes()
    for name in (b"val_id/energy_mae", b"adsorbates", b"elements", b"errors_by_adsorbate"):
        assert name in content, name

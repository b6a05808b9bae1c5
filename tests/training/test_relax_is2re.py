"""`equiformer2 relax-is2re`: relaxations in a folder that a killed run comes back to, and their metrics."""

import json
import math
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from ase.io import read
from command_line import ROOT, run_script_file
from tiny_adapters import make_adapter, network, write_network
from tiny_checkpoint import write_tiny_checkpoint
from torch_geometric.data import Data

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb
from datasets_oc20.structure_record import PackedRecord
from equiformer2.checkpoint.adapted import merge_adapters
from equiformer2.checkpoint.adapter_files import write_adapter
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.inference.relaxation_folder import RelaxationFolder
from equiformer2.training.relaxation_run import is2rs_metrics, position_errors

SYSTEMS = 5
#: Runs a script that is killed, as if from outside, when the second system is done.
KILLED_AFTER_TWO = """
import os, runpy, signal, sys
from equiformer2.inference.relaxation_folder import RelaxationFolder

add = RelaxationFolder.add
def add_and_die(self, *arguments):
    add(self, *arguments)
    if len(self.rows) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
RelaxationFolder.add = add_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "model.pt")


def write_is2re(
    path: Path, lmdb_path: Path, targets: bool = True, sids: bool = True, kind: str = "adsorption"
) -> Path:
    """Frames of the genuine file as systems of their own, their last frame as target."""
    frames = OC20Lmdb(lmdb_path)
    with LmdbWriter(path, kind) as writer:
        for index in range(SYSTEMS):
            record = frames[index]
            if sids:
                record.sid = str(100 + index)
            del record.forces, record.energy
            if targets:
                record.energy = record.y_relaxed = torch.tensor([-1.0 - 0.01 * index])
                record.pos_relaxed = frames[19].pos
            writer.write(record)
    return path


#: What is wrong with some systems of `write_with_unusable`, and the words of the reason.
UNUSABLE = {
    "101": "pos holds NaN or infinite values (atom 4)",
    "102": "(Hs, Z = 108) is outside the network's element table",
    "104": "is periodic along axis 0 but its lattice vector there is",
}


def write_with_unusable(path: Path, lmdb_path: Path, sids: set[str]) -> Path:
    """As `write_is2re`, with what `UNUSABLE` says of the systems `sids`: other programs check less."""
    write_is2re(path, lmdb_path)
    frames = [OC20Lmdb(path)[index] for index in range(SYSTEMS)]
    with lmdb.open(str(path), subdir=False, map_size=2**28) as file, file.begin(write=True) as transaction:
        for key, value in list(transaction.cursor()):
            if not PackedRecord.matches(value) or frames[int(key)].sid not in sids:
                continue
            content = bytearray(value)
            arrays = {
                name: np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape)
                for name, dtype, shape, offset in PackedRecord(value, str(path)).arrays
            }
            sid = frames[int(key)].sid
            if sid == "101":
                arrays["pos"][4, 1] = np.nan
            elif sid == "102":
                arrays["atomic_numbers"][0] = 108
            elif sid == "104":
                arrays["cell"][0, 0, 0] = 0.0
                arrays["pbc"][0, 2] = False
            else:
                arrays["pos"][1] = arrays["pos"][0]
            content[4:8] = zlib.crc32(content[8:]).to_bytes(4, "little")
            transaction.put(key, bytes(content))
    return path


def arguments(checkpoint: Path, data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "--checkpoint", checkpoint, "--data", data, "--out", out, "--overwrite",
        "--steps", 4, "--fmax", 1e-4, "--batch-size", 2, *more,
    )  # fmt: skip


def test_metrics_and_trajectories(
    checkpoint: Path,
    lmdb_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = write_is2re(tmp_path / "val_id.lmdb", lmdb_path), tmp_path / "out"
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, out)) == 0
    report = json.loads((out / "val_id" / "is2re.json").read_text())
    records = OC20Lmdb(data)
    with np.load(out / "val_id" / "relaxed.npz") as relaxed:
        assert relaxed["sid"].tolist() == [str(100 + index) for index in range(SYSTEMS)]
        energies = relaxed["energy"]
        assert relaxed["steps"].tolist() == [4] * SYSTEMS
    errors = []
    for index in range(SYSTEMS):
        record = records[index]
        frames = read(out / "val_id" / "trajectories" / f"{100 + index}.traj", ":")
        assert len(frames) == 5
        assert frames[-1].get_potential_energy() == pytest.approx(energies[index])
        assert frames[-1].get_tags().tolist() == record.tags.tolist()
        free = ~record.fixed.numpy()
        assert frames[0].constraints[0].get_indices().tolist() == np.flatnonzero(~free).tolist()
        np.testing.assert_array_equal(frames[0].positions, record.pos.numpy())
        moved = np.linalg.norm(frames[-1].positions - frames[0].positions, axis=1)
        assert moved[free].max() > 0.01
        assert moved[~free].max() == 0.0
        errors.append(
            position_errors(
                frames[-1].positions[free],
                record.pos_relaxed.numpy()[free],
                record.cell[0].numpy(),
                record.pbc[0].numpy(),
            )
        )
    expected = is2rs_metrics(errors)
    for name, value in expected.items():
        assert report["metrics"][name] == pytest.approx(value, abs=1e-6), name
    target = np.array([-1.0 - 0.01 * index for index in range(SYSTEMS)])
    assert report["metrics"]["energy_mae"] == pytest.approx(np.abs(energies - target).mean())
    assert 0 < report["not_relaxed"]["positions_mae"] != report["metrics"]["positions_mae"]
    assert "average_forces_below_threshold" in report["not_calculated"]
    assert "ADwT" in capsys.readouterr().out
    assert json.loads((out / "is2re.json").read_text())["average"] == report["metrics"]


@pytest.mark.slow
def test_a_killed_run_goes_on(
    checkpoint: Path,
    lmdb_path: Path,
    tmp_path: Path,
) -> None:
    data = write_is2re(tmp_path / "val_id.lmdb", lmdb_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--batch-size", 2, "--steps", 6)
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, whole, *more)) == 0
    log = killed / "val_id" / "relaxed.jsonl"
    command = [sys.executable, "-c", KILLED_AFTER_TWO, ROOT / "scripts" / "relax_is2re.py"]
    command += arguments(checkpoint, data, killed, *more)
    process = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=False)
    assert process.returncode == -signal.SIGKILL
    assert log.read_bytes().count(b"\n") == 2
    assert not (killed / "val_id" / "is2re.json").exists()
    log.write_bytes(log.read_bytes() + b'{"index": 4, "sid"')  # and a line that was not finished
    (killed / "val_id" / "trajectories" / ".104.traj.1.tmp").write_bytes(b"half")
    first = read(killed / "val_id" / "trajectories" / "100.traj", "-1")
    stamp = (killed / "val_id" / "trajectories" / "100.traj").stat().st_mtime_ns
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, killed, *more)) == 0
    assert (killed / "val_id" / "trajectories" / "100.traj").stat().st_mtime_ns == stamp
    assert len(log.read_text().splitlines()) == SYSTEMS
    report, other = (json.loads((folder / "is2re.json").read_text()) for folder in (whole, killed))
    assert report["average"] == pytest.approx(other["average"], abs=1e-6)
    np.testing.assert_allclose(
        first.positions, read(whole / "val_id" / "trajectories" / "100.traj", "-1").positions, atol=1e-6
    )
    assert not list((killed / "val_id").rglob("*.tmp"))


def test_what_cannot_be_mixed_is_refused(
    checkpoint: Path,
    lmdb_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = write_is2re(tmp_path / "val_id.lmdb", lmdb_path, targets=False), tmp_path / "out"
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, out)) == 0
    report = json.loads((out / "val_id" / "is2re.json").read_text())
    assert report["metrics"] == {}
    assert report["structures"] == SYSTEMS
    (tmp_path / "here").mkdir()
    data.rename(tmp_path / "here" / data.name)
    monkeypatch.chdir(tmp_path / "here")  # the folder without a name of its own
    assert run_script_file("relax_is2re", *arguments(checkpoint, Path(), out)) == 0
    assert json.loads((out / "here" / "is2re.json").read_text())["structures"] == SYSTEMS
    (tmp_path / "here" / data.name).rename(data)
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, out, "--fmax", 0.5)) == 2
    assert "holds relaxations with fmax 0.0001, not 0.5: give another folder" in capsys.readouterr().err
    taken = tmp_path / "taken"
    (taken / "val_id").mkdir(parents=True)
    (taken / "val_id" / "notes.txt").write_text("mine")
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, taken)) == 2
    assert "holds something else than relaxations" in capsys.readouterr().err
    log = out / "val_id" / "relaxed.jsonl"
    log.write_text(log.read_text().replace('"sid"', "sid", 1))
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, out)) == 2
    assert "relaxed.jsonl, line 1 is damaged" in capsys.readouterr().err

    (out / "val_id" / "settings.json").write_text("[]")
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, out)) == 2
    assert "holds relaxations with alpha None, not" in capsys.readouterr().err

    frames = write_is2re(tmp_path / "frames.lmdb", lmdb_path, sids=False)
    assert run_script_file("relax_is2re", *arguments(checkpoint, frames, out)) == 2
    assert "structures 0 and 1 have the same sid" in capsys.readouterr().err


def test_an_adapter_relaxes_as_its_merged_network_and_is_named(
    lmdb_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, model = tmp_path / "base.pt", network(max_radius=5.0)
    write_network(base, model)
    for name, seed in (("adapter", 0), ("other", 1)):
        write_adapter(tmp_path / f"{name}.pt", make_adapter(model, seed))
    merge_adapters(base, [tmp_path / "adapter.pt"], tmp_path / "merged.pt")
    data = write_is2re(tmp_path / "starts.lmdb", lmdb_path, targets=False, kind="total")
    adapted = ["--adapter", tmp_path / "adapter.pt"]
    assert run_script_file("relax_is2re", *arguments(base, data, tmp_path / "a", *adapted)) == 0
    assert run_script_file("relax_is2re", *arguments(tmp_path / "merged.pt", data, tmp_path / "m")) == 0
    energies = []
    for folder in (tmp_path / "a", tmp_path / "m"):
        with np.load(folder / "starts" / "relaxed.npz") as arrays:
            energies.append(arrays["energy"])
    assert energies[0] == pytest.approx(energies[1], abs=1e-3)
    own = {"adapter": str(tmp_path / "adapter.pt"), "adapter_sha256": sha256(tmp_path / "adapter.pt")}
    for file in ("is2re.json", "starts/is2re.json"):
        record = json.loads((tmp_path / "a" / file).read_text())
        assert own.items() <= record.items()
        assert "adapter" not in json.loads((tmp_path / "m" / file).read_text())
    assert record["energy_kind"] == "total"  # the adapter's, not the network's
    capsys.readouterr()
    for more, message in (
        (["--adapter", tmp_path / "other.pt"], "holds relaxations with adapter"),
        ([], "the checkpoint predicts adsorption energies"),
        (["--adapter", base], "checkpoint of a whole network"),
        (["--adapter", tmp_path / "none.pt"], "none.pt"),
        (["--adapter", tmp_path / "adapter.pt", "--checkpoint", base, base], "belongs to one network"),
    ):
        assert run_script_file("relax_is2re", *arguments(base, data, tmp_path / "a", *more)) == 2
        assert message in capsys.readouterr().err


def test_unusable_systems_are_skipped_and_named(
    checkpoint: Path,
    lmdb_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_with_unusable(tmp_path / "val_id.lmdb", lmdb_path, set(UNUSABLE))
    out = tmp_path / "out"
    folder = out / "val_id"
    for _ in range(2):  # and when the same command comes again
        assert run_script_file("relax_is2re", *arguments(checkpoint, data, out)) == 0
        report, lines = json.loads((folder / "is2re.json").read_text()), capsys.readouterr().out
        assert (report["structures"], report["relaxed"]) == (SYSTEMS, 2)
        written = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
        assert sorted(written, key=lambda row: row["index"]) == report["skipped"]
        assert [row["name"] for row in report["skipped"]] == list(UNUSABLE)
        for row, reason in zip(report["skipped"], UNUSABLE.values(), strict=True):
            assert reason in row["reason"]
            assert f"    {row['name']}: {row['reason']}" in lines
        assert "All of this is of 2 of 5 structures" in lines
    with np.load(folder / "relaxed.npz") as relaxed:
        assert relaxed["sid"].tolist() == ["100", "103"]
        assert relaxed["skipped"].tolist() == list(UNUSABLE)
        target = np.array([-1.0, -1.03])
        assert report["metrics"]["energy_mae"] == pytest.approx(np.abs(relaxed["energy"] - target).mean())
    whole = json.loads((out / "is2re.json").read_text())
    assert (whole["structures"], whole["relaxed"]) == (SYSTEMS, 2)

    splits = [item for split in ("id", "ood-ads", "ood-cat", "ood-both") for item in (f"--{split}", folder)]
    wanted = tmp_path / "is2re.npz"
    assert run_script_file("make_submission", "--task", "is2re", *splits, "--out", wanted) == 2
    error = capsys.readouterr().err
    assert "lacks 3 of 5 systems, which `equiformer2 relax-is2re` could not relax: 101, 102, 104;" in error
    assert not wanted.exists()

    # Repaired, the same command relaxes what is missing.
    data.unlink()
    write_is2re(data, lmdb_path)
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, out)) == 0
    assert "skipped" not in capsys.readouterr().out
    assert (folder / "skipped.jsonl").read_text() == ""
    assert run_script_file("make_submission", "--task", "is2re", *splits, "--out", wanted) == 0


@pytest.mark.parametrize(
    ("sid", "change"),
    [
        ("103", lambda record: record.pos[0].add_(torch.tensor([0.0, 0.0, 1e-5]))),
        ("100", lambda record: record.fixed.fill_(False)),
        ("102", lambda record: record.pos_relaxed.add_(0.01)),
    ],
    ids=["position", "held atoms", "target"],
)
def test_other_start_structures_are_noticed(
    checkpoint: Path,
    lmdb_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sid: str,
    change: Callable[[Data], object],
) -> None:
    data, out = write_is2re(tmp_path / "val_id.lmdb", lmdb_path), tmp_path / "out"
    more = ("--steps", 0)
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, out, *more)) == 0
    good, size = [OC20Lmdb(data)[index] for index in range(SYSTEMS)], data.stat().st_size
    data.unlink()
    with LmdbWriter(data, "adsorption") as writer:
        for record in good:
            if record.sid == sid:
                change(record)
            writer.write(record)
    assert data.stat().st_size == size
    capsys.readouterr()
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, out, *more)) == 2
    error = capsys.readouterr().err
    assert f"holds a relaxation of the system {sid} from another start structure" in error
    assert "give another folder, or the data as they were" in error


def test_nothing_to_relax_is_an_error(
    checkpoint: Path,
    lmdb_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    everything = {str(100 + index) for index in range(SYSTEMS)}
    data = write_with_unusable(tmp_path / "val_id.lmdb", lmdb_path, everything)
    assert run_script_file("relax_is2re", *arguments(checkpoint, data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "none of its 5 structures can be relaxed, 100 for instance: " in error
    assert len((tmp_path / "out" / "val_id" / "skipped.jsonl").read_text().splitlines()) == SYSTEMS
    assert not (tmp_path / "out" / "val_id" / "is2re.json").exists()


def test_a_folder_without_a_finished_system_is_free_and_a_busy_one_is_not(tmp_path: Path) -> None:
    first = RelaxationFolder(tmp_path / "out", {"fmax": 0.1})
    with first.open():
        assert not first.rows
        with (
            pytest.raises(DataError, match="another process is writing here"),
            RelaxationFolder(tmp_path / "out", {"fmax": 0.1}).open(),
        ):
            pass
    with RelaxationFolder(tmp_path / "out", {"fmax": 0.2}).open():
        assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {"fmax": 0.2}

"""Raw releases to LMDB: energies, filters, choices, and errors before anything is written."""

import lzma
from pathlib import Path

import pytest
import torch
from command_line import run_command
from oc20_files import assert_same, frame_text

from datasets_oc20 import DataError, OC20Lmdb
from datasets_oc20.preprocess import PreprocessOptions, preprocess

ROOT = Path(__file__).parents[2]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two relaxations of 10 and 6 frames; frame k of the first has adsorption energy 1 - k / 10."""
    folder = tmp_path / "raw"
    folder.mkdir()
    first = "".join(frame_text(energy=-19 - k / 10, force=1.0 / (k + 1), seed=k) for k in range(10))
    second = "".join(frame_text(natoms=6, energy=-50 - k, force=0.2, seed=100 + k) for k in range(6))
    (folder / "random1.extxyz.xz").write_bytes(lzma.compress(first.encode()))
    (folder / "random2.extxyz").write_text(second)
    (folder / "system.txt").write_text("random2,-50.5\nrandom1,-20.0\n")
    return folder


def test_adsorption_energies_and_all_fields(raw: Path, tmp_path: Path) -> None:
    report = preprocess(raw, tmp_path / "out.lmdb", num_workers=1)
    dataset = OC20Lmdb(tmp_path / "out.lmdb")
    assert (report.files, report.read, report.written) == (2, 16, 16)
    assert dataset.energy_kind == "adsorption"
    assert [(data.sid, data.fid) for data in dataset] == [("random1", k) for k in range(10)] + [
        ("random2", k) for k in range(6)
    ]
    assert dataset[3].energy.item() == pytest.approx(0.7, abs=1e-6)
    assert dataset[10].energy.item() == pytest.approx(0.5, abs=1e-6)
    data = dataset[0]
    assert data.fixed.tolist() == [True, False, False, False]
    assert data.tags.tolist() == [0, 1, 1, 2]
    assert data.atomic_numbers.tolist() == [29, 29, 29, 8]
    assert data.forces[:, 0].tolist() == [99.0, 1.0, 1.0, 1.0]
    assert data.cell[0].tolist() == [[8, 0, 0], [1, 8, 0], [0, 0, 20]]


def test_total_energies_need_no_references(raw: Path, tmp_path: Path) -> None:
    (raw / "system.txt").unlink()
    options = PreprocessOptions(energy_kind="total")
    preprocess(raw, tmp_path / "out.lmdb", options, num_workers=1)
    dataset = OC20Lmdb(tmp_path / "out.lmdb")
    assert dataset.energy_kind == "total"
    assert dataset[0].energy.item() == -19.0


def test_the_number_of_workers_does_not_change_the_file(raw: Path, tmp_path: Path) -> None:
    preprocess(raw, tmp_path / "one.lmdb", num_workers=1)
    preprocess(raw, tmp_path / "two.lmdb", num_workers=2)
    assert (tmp_path / "one.lmdb").read_bytes() == (tmp_path / "two.lmdb").read_bytes()


def test_filters_are_counted(raw: Path, tmp_path: Path) -> None:
    options = PreprocessOptions(max_energy=0.65, max_force=0.3)
    report = preprocess(raw, tmp_path / "out.lmdb", options, num_workers=1)
    # random1: energies 1.0 0.9 0.8 0.7 are above 0.65, forces are 1/5 and less from there on.
    # random2: energies 0.5 -0.5 -1.5 ... keep two.
    assert (report.removed_energy, report.removed_force, report.written) == (8, 0, 8)
    options = PreprocessOptions(max_energy=None, max_force=0.3)
    report = preprocess(raw, tmp_path / "out.lmdb", options, num_workers=1)
    # 1, 1/2 and 1/3 eV/Å; the 99 eV/Å on the fixed atom does not count.
    assert (report.removed_energy, report.removed_force, report.written) == (0, 3, 13)
    with pytest.raises(DataError, match="loosen the filters"):
        preprocess(raw, tmp_path / "none.lmdb", PreprocessOptions(max_force=0.01), num_workers=1)
    assert not (tmp_path / "none.lmdb").exists()


def test_later_frames_and_informative_frames(raw: Path, tmp_path: Path) -> None:
    options = PreprocessOptions(frames=4, later_fraction=0.3, later_gap=0.2, later_frames=2)
    report = preprocess(raw, tmp_path / "out.lmdb", options, later_out=tmp_path / "later.lmdb", num_workers=1)
    kept = {(data.sid, data.fid) for data in OC20Lmdb(tmp_path / "out.lmdb")}
    later = {(data.sid, data.fid) for data in OC20Lmdb(tmp_path / "later.lmdb")}
    # random1: frames 7 8 9 are later, 5 6 the gap; of 0 to 4, 0 and 4 are the spread, and 1 and 2 have the
    # largest forces of the others.
    assert {fid for sid, fid in kept if sid == "random1"} == {0, 1, 2, 4}
    assert {fid for sid, fid in later if sid == "random1"} == {7, 9}
    assert {fid for sid, fid in kept if sid == "random2"} == {0, 1, 2}
    assert {fid for sid, fid in later if sid == "random2"} == {4, 5}
    assert report.read == report.written + report.written_later + report.not_chosen
    with pytest.raises(DataError, match="must be given together"):
        preprocess(raw, tmp_path / "out.lmdb", options, num_workers=1)


def test_the_later_frames_need_a_file_of_their_own(raw: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out.lmdb", tmp_path / "raw" / ".." / "out.lmdb"
    with pytest.raises(DataError, match=r"out\.lmdb: .*later frames"):
        preprocess(raw, out, PreprocessOptions(later_fraction=0.3), later_out=again, num_workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_choice_of_systems(raw: Path, tmp_path: Path) -> None:
    def systems(**choice) -> set[str]:
        preprocess(raw, tmp_path / "out.lmdb", num_workers=1, **choice)
        return {data.sid for data in OC20Lmdb(tmp_path / "out.lmdb")}

    assert systems(systems=["random2"]) == {"random2"}
    assert systems(exclude=["random2"]) == {"random1"}
    with pytest.raises(DataError, match="raw: there is no file for system random3"):
        systems(systems=["random3"])
    with pytest.raises(DataError, match="every system is excluded"):
        systems(exclude=["random1", "random2"])


def test_s2ef_chunks_with_their_index(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chunks"
    folder.mkdir()
    (folder / "0.extxyz").write_text(frame_text(energy=-30.0) + frame_text(natoms=5, energy=-41.0))
    (folder / "0.txt").write_text("random7,frame114,-32.0\nrandom9,frame2,-40.0\n")
    preprocess(folder, tmp_path / "out.lmdb", num_workers=1)
    dataset = OC20Lmdb(tmp_path / "out.lmdb")
    assert [(d.sid, d.fid, d.energy.item()) for d in dataset] == [("random7", 114, 2.0), ("random9", 2, -1.0)]
    with pytest.raises(DataError, match="mix systems"):
        preprocess(folder, tmp_path / "out.lmdb", PreprocessOptions(frames=1), num_workers=1)
    (folder / "0.txt").write_text("random7,frame114,-32.0\n")
    with pytest.raises(DataError, match=r"0\.txt: 1 lines for the 2 frames of 0\.extxyz"):
        preprocess(folder, tmp_path / "out.lmdb", num_workers=1)
    (folder / "0.txt").write_text("random7,114\n")
    with pytest.raises(DataError, match=r"0\.txt, line 1: expected"):
        preprocess(folder, tmp_path / "out.lmdb", num_workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_leave_nothing(raw: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out.lmdb"

    def message() -> str:
        with pytest.raises(DataError) as caught:
            preprocess(raw, out, num_workers=workers)
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]
        return str(caught.value)

    (raw / "system.txt").write_text("random1,-20.0\n")
    assert "system.txt: there is no reference energy for system random2" in message()
    (raw / "system.txt").write_text("random1,-20.0\nrandom2\n")
    assert "system.txt, line 2: expected 'system_id,reference_energy'" in message()
    (raw / "system.txt").write_text("random1,-20.0\nrandom2,low\n")
    assert "system.txt, line 2: the reference energy 'low' is not a number" in message()
    (raw / "system.txt").write_text("random1,-20.0\nrandom2,-50\n")
    whole = (raw / "random2.extxyz").read_text()
    (raw / "random2.extxyz").write_text(whole[:-150])
    assert "random2.extxyz, frame 5: " in message()
    (raw / "random2.extxyz").write_text(whole.replace("energy=-53", "energy=nan"))
    assert "random2.extxyz, frame 3: energy holds NaN" in message()
    (raw / "random2.extxyz").write_text(whole)
    compressed = (raw / "random1.extxyz.xz").read_bytes()
    (raw / "random1.extxyz.xz").write_bytes(compressed[: len(compressed) // 2])
    assert "random1.extxyz.xz: the file is truncated" in message()
    (raw / "system.txt").unlink()
    assert "system.txt: no such file" in message()


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such folder"):
        preprocess(tmp_path / "absent", tmp_path / "out.lmdb")
    with pytest.raises(DataError, match="holds no"):
        preprocess(tmp_path, tmp_path / "out.lmdb")


@pytest.mark.parametrize(
    "wrong",
    [
        {"energy_kind": "free"},
        {"energy_kind": None},
        {"max_energy": 0.0},
        {"max_force": float("nan")},
        {"frames": 0},
        {"later_fraction": 0.95},
        {"later_fraction": -0.1},
    ],
)
def test_wrong_options(wrong: dict) -> None:
    with pytest.raises(DataError):
        PreprocessOptions(**wrong)


def test_command_on_a_bundled_relaxation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "small.lmdb"
    options = ["--data", ROOT / "data" / "oc20_trajs", "--out", out, "--systems", "random1447590"]
    assert run_command("data preprocess", *options) == 0
    assert "47 of 47 frames of 1 files" in capsys.readouterr().out
    dataset = OC20Lmdb(out)
    assert len(dataset) == 47
    # Last frame: DFT energy in the raw file less the reference in system.txt.
    reference = dict(
        line.split(",") for line in (ROOT / "data/oc20_trajs/system.txt").read_text().splitlines() if line
    )
    preprocess(
        ROOT / "data/oc20_trajs",
        tmp_path / "total.lmdb",
        PreprocessOptions(energy_kind="total"),
        systems=["random1447590"],
        num_workers=1,
    )
    total = OC20Lmdb(tmp_path / "total.lmdb")[46]
    assert total.energy.item() - float(reference["random1447590"]) == pytest.approx(
        dataset[46].energy.item(), abs=1e-3
    )
    assert torch.equal(dataset[46].fixed, dataset[46].tags == 0)
    total.energy = dataset[46].energy
    assert_same(total, dataset[46])


def test_the_command_reports_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("data preprocess", "--data", tmp_path / "absent", "--out", tmp_path / "out.lmdb") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / "absent") in line

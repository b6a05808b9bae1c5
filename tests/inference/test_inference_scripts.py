"""scripts/relax.py and scripts/adsorption_energy.py from the command line to the files they leave."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from command_line import run_script_file

from equiformer2.inference import EquiformerV2Calculator

ROOT = Path(__file__).parents[2]
SLAB = ["--slab", "Cu111", "--size", "1x1x3", "--vacuum", "6"]


def run(script: str, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A script as its own process, the way users start it."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_pictures(folder: Path) -> None:
    for name in ("structure.png", "relaxation.png"):
        picture = matplotlib.image.imread(folder / name)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.02  # something is drawn


@pytest.mark.slow
@pytest.mark.pictures
def test_adsorption_energy_by_name(checkpoint: Path, tmp_path: Path) -> None:
    done = run(
        "adsorption_energy.py", "--checkpoint", checkpoint, *SLAB, "--adsorbate", "*CO",
        "--site", "fcc", "--steps", "2", "--out", "result", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr  # written, and not converged
    assert done.stdout.splitlines()[-1].startswith("NOT converged")
    assert "nothing was subtracted" in done.stdout
    record = json.loads((tmp_path / "result" / "adsorption_energy.json").read_text())
    assert f"adsorption energy: {record['adsorption_energy_eV']:.4f} eV" in done.stdout
    assert record["model_energy_kind"] == "adsorption"
    assert record["model"]["weights"] == "raw"
    frames = read(tmp_path / "result" / "relaxation.traj", ":")
    assert len(frames) == record["system"]["steps"] + 1
    relaxed = read(tmp_path / "result" / "relaxed.extxyz")
    assert relaxed.get_tags().tolist() == [0, 1, 1, 2, 2]
    assert relaxed.constraints
    assert record["adsorption_energy_eV"] == pytest.approx(relaxed.get_potential_energy(), abs=1e-6)
    again = EquiformerV2Calculator(checkpoint).get_potential_energy(relaxed)
    assert again == pytest.approx(record["adsorption_energy_eV"], abs=1e-3)
    assert sorted(path.name for path in (tmp_path / "result").iterdir()) == sorted(
        [*record["files"], "adsorption_energy.json"]
    )
    check_pictures(tmp_path / "result")


def test_an_earlier_result_is_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("result").mkdir()
    record = Path("result/adsorption_energy.json")
    record.write_text("{}")
    arguments = ["--checkpoint", checkpoint, *SLAB, "--adsorbate", "O", "--steps", "0", "--out", "result"]
    assert run_script_file("adsorption_energy", *arguments) == 2
    assert "already holds a result" in capsys.readouterr().err
    assert record.read_text() == "{}"
    assert run_script_file("adsorption_energy", *arguments, "--overwrite") == 3
    assert json.loads(record.read_text())["adsorbate"] == "O"


@pytest.mark.slow
def test_total_energy_model_from_a_file(
    make_checkpoint: Callable[..., Path],
    oxygen_on_copper: Atoms,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write("system.traj", oxygen_on_copper)
    status = run_script_file(
        "adsorption_energy", "--checkpoint", make_checkpoint("total"), "--system", "system.traj",
        "--gas-reference", "O=-5", "--steps", "1", "--out", "result",
    )  # fmt: skip
    assert status == 0
    record = json.loads(Path("result/adsorption_energy.json").read_text())
    terms = record["terms_eV"]
    assert terms["gas"] == -5
    assert record["adsorption_energy_eV"] == pytest.approx(terms["slab_and_adsorbate"] - terms["slab"] + 5)
    assert "- clean slab" in capsys.readouterr().out
    assert len(read("result/slab.traj")) == 12


@pytest.mark.pictures
def test_relax(
    checkpoint: Path,
    oxygen_on_copper: Atoms,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    oxygen_on_copper.info = {}
    write("system.extxyz", oxygen_on_copper)
    status = run_script_file(
        "relax", "--checkpoint", checkpoint, "--structure", "system.extxyz",
        "--steps", "2", "--optimizer", "FIRE", "--fmax", "1e-4", "--out", "result",
    )  # fmt: skip
    assert status == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("adsorption energy:")
    assert "NOT converged after 2 FIRE steps" in lines[-1]
    record = json.loads(Path("result/relaxation.json").read_text())
    assert not record["converged"]
    assert record["optimizer"] == "FIRE"
    frames = read("result/relaxation.traj", ":")
    assert len(frames) == record["steps"] + 1
    assert np.array_equal(frames[-1].positions[:8], frames[0].positions[:8])
    check_pictures(Path("result"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*SLAB, "--adsorbate", "CO", "--slab-energy", "-3"],
            "already have slab and gas references subtracted",
        ),
        ([*SLAB, "--adsorbate", "CO", "--gas-reference", "O=-3"], "already have slab and gas references"),
        ([*SLAB, "--adsorbate", "CO", "--energy-kind", "total"], "adsorption energies"),
        ([*SLAB, "--adsorbate", "CO", "--gas-reference", "O:3"], "such as S=-4.1"),
        ([*SLAB, "--adsorbate", "O", "--gas", "O=-4", "--gas-reference", "O=-3"], "gives O twice"),
        ([*SLAB, "--adsorbate", "O", "--gas", "vacuum,O=-4"], "--gas vacuum and the energy of O per atom"),
        ([*SLAB], "either --system, or --slab and --adsorbate"),
        ([*SLAB, "--adsorbate", "CO", "--system", "nan.traj"], "either --system, or --slab and --adsorbate"),
        (["--slab", "Cu111", "--size", "3x3", "--adsorbate", "CO"], "three numbers"),
        (["--system", "missing.traj"], "missing.traj"),
        (["--system", "nan.traj"], "atom 12 (O) has a non-finite position"),
        (["--system", "uranium.traj"], "Z = 92"),
        (["--system", "nocell.traj"], "no lattice vector"),
        (["--system", "untagged.traj"], "no atom is marked as adsorbate"),
        ([*SLAB, "--adsorbate", "CO", "--fmax", "-1"], "fmax is -1"),
        ([*SLAB, "--adsorbate", "CO", "--height", "-2"], "height is -2.0: give a positive number of Å"),
        ([*SLAB, "--adsorbate", "CO", "--height", "nan"], "height is nan"),
    ],
)
def test_wrong_input_is_one_line(
    checkpoint: Path,
    oxygen_on_copper: Atoms,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_wrong_structures(oxygen_on_copper)
    before = sorted(tmp_path.iterdir())
    status = run_script_file("adsorption_energy", "--checkpoint", checkpoint, "--out", "result", *arguments)
    assert status == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert "Traceback" not in "".join(error)
    assert sorted(tmp_path.iterdir()) == before  # nothing was written


def test_energy_only_model_and_damaged_checkpoint(
    make_checkpoint: Callable[..., Path], oxygen_on_copper: Atoms, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write("system.traj", oxygen_on_copper)
    Path("broken.pt").write_bytes(b"not a checkpoint")
    for path, message in (
        (make_checkpoint(forces="none"), "predicts no forces"),
        ("broken.pt", "broken.pt"),
    ):
        for script, option in (("relax", "--structure"), ("adsorption_energy", "--system")):
            assert (
                run_script_file(script, "--checkpoint", path, option, "system.traj", "--out", "result") == 2
            )
            assert message in capsys.readouterr().err
    assert not Path("result").exists()


def write_wrong_structures(system: Atoms) -> None:
    """Files `nan.traj`, `uranium.traj`, `nocell.traj` and `untagged.traj` in the current folder."""
    nan, uranium, no_cell, untagged = (system.copy() for _ in range(4))
    nan.positions[12] = np.nan
    uranium.numbers[0] = 92
    no_cell.cell[:] = 0
    untagged.set_tags(0)
    for name, atoms in (("nan", nan), ("uranium", uranium), ("nocell", no_cell), ("untagged", untagged)):
        write(f"{name}.traj", atoms)

"""The command `equiformer2 adsorption slab`."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, fcc111
from ase.io import read, write
from command_line import run_command

from equiformer2.inference.atoms import fixed_mask


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_adsorbates_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("adsorption slab", "--list-adsorbates") == 0
    assert len(capsys.readouterr().out.splitlines()) == 87
    assert run_command("adsorption slab", "--list-adsorbates", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["adsorbates"]) == 86
    assert record["adsorbates"][10] == {
        "name": "*CH2*O",
        "formula": "CH2O",
        "atoms": 4,
        "binding_indices": [0, 3],
        "binding_atoms": ["C", "O"],
    }


def test_one_slab_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--bulk", "Cu fcc a=3.68", "--miller", "1,1,1", "--width", "5", "--out", "cu.extxyz"]
    assert run_command("adsorption slab", *arguments, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    (slab,) = record["slabs"]
    assert record["schema"] == "adsorption-slab/1"
    assert record["notices"] == []
    assert slab["miller"] == [1, 1, 1]
    assert slab["thickness_A"] >= 7
    assert slab["file"] == "cu.extxyz"
    assert [path.name for path in Path().iterdir()] == ["cu.extxyz"]
    atoms = read("cu.extxyz")
    assert len(atoms) == slab["atoms"]
    assert fixed_mask(atoms).sum() == slab["held"]
    assert np.array_equal(fixed_mask(atoms), atoms.get_tags() == 0)
    assert run_command("adsorption slab", *arguments) == 2
    assert "--overwrite to replace it" in capsys.readouterr().err
    assert run_command("adsorption slab", *arguments, "--overwrite") == 0


def test_slabs_to_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("adsorption slab", "--bulk", "Cu", "--width", "3", "--out", "slabs") == 0
    assert "-1.8% from RPBE's 3.676" in capsys.readouterr().out
    names = sorted(path.name for path in Path("slabs").iterdir())
    assert names == ["Cu_100.extxyz", "Cu_110.extxyz", "Cu_111.extxyz", "slabs.json"]
    record = json.loads(Path("slabs/slabs.json").read_text())
    assert [slab["file"] for slab in record["slabs"]] == [f"slabs/{name}" for name in names[:3]]


def test_a_slab_file_is_completed() -> None:
    slab = fcc111("Cu", (2, 2, 4), vacuum=10, periodic=True)
    slab.set_tags(0)
    write("POSCAR.vasp", slab)
    assert run_command("adsorption slab", "--slab", "POSCAR.vasp", "--out", "slab.traj") == 0
    assert fixed_mask(read("slab.traj")).sum() == 12
    assert run_command("adsorption slab", "--slab", "POSCAR.vasp", "--out", "POSCAR.vasp", "--overwrite") == 2


def test_relaxed_bulk(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--bulk", "Cu", "--miller", "100", "--width", "3", "--relax-bulk", "--calculator", "emt"]
    assert run_command("adsorption slab", *arguments, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["relaxed_bulk"]["lattice_constant_A"] == pytest.approx(3.59, abs=0.01)
    assert record["relaxed_bulk"]["method"] == "energy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments"),
        (["--bulk", "Cu", "--slab", "Pt111"], "not allowed with"),
        (["--bulk", "foo"], "there is no bulk 'foo'"),
        (["--bulk", "missing.cif"], "missing.cif"),
        (["--bulk", "mp-30"], "--bulks"),
        (["--bulk", "mp-30", "--bulks", "cu.cif"], "holds no bulk with a number"),
        (["--bulk", "Cu", "--miller", "000"], "are no Miller indices"),
        (["--bulk", "Cu", "--miller", "1.5,0,0"], "are no Miller indices"),
        (["--bulk", "Cu", "--termination", "7", "--miller", "111"], "no number 7"),
        (["--slab", "Pt111", "--miller", "111"], "--miller has no meaning without --bulk"),
        (["--slab", "cu.cif"], "no vacuum"),
        (["--bulk", "Cu", "--relax-bulk"], "need --checkpoint or --calculator"),
        (["--bulk", "Cu", "--calculator", "emt"], "a model has no meaning"),
        (["--bulk", "Cu", "--check-convergence", "--calculator", "emt"], "there are 3: give one"),
        (
            ["--bulk", "Cu", "--miller", "111", "--check-convergence", "--calculator", "emt", "--width", "5"],
            "leave the option out",
        ),
        (
            ["--bulk", "Fe", "--miller", "110", "--check-convergence", "--calculator", "emt"],
            "no energy could be calculated: Fe",
        ),
        (["--bulk", "Cu", "--vacuum", "2"], "--vacuum; OC20 has 20"),
        (["--bulk", "Cu", "--adapter", "a.pt"], "--adapter has no meaning without --checkpoint"),
        (["--bulk", "Cu", "--miller", "all", "--out", "one.traj"], "is one file for 3 slabs"),
        (["--bulk", "Cu", "--miller", "111", "--out", "one.foo"], "ASE writes no structures"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("cu.cif", bulk("Cu", cubic=True))
    assert run_command("adsorption slab", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("one.traj").exists()


def test_surface_energies_are_printed_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "slabs"
    cut = ["--bulk", "Cu fcc a=3.6", "--miller", "all", "--width", "4", "--calculator", "emt"]
    assert run_command("adsorption slab", *cut, "--surface-energies", "--out", out) == 0
    assert "Cu (fcc) (111)   0.06495" in capsys.readouterr().out
    (document,) = out.glob("*.json")
    rows = json.loads(document.read_text())["surface_energies"]["rows"]
    assert [row["miller"] for row in rows] == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert run_command("adsorption slab", *cut) == 2
    assert "--surface-energies" in capsys.readouterr().err

"""The command `equiformer2 data import`, and other commands on the same files."""

import json
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from command_line import run_command

from datasets_oc20 import OC20Lmdb

DATA = Path(__file__).parents[1] / "data/own_data"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> object:
    """The folder in which a test runs."""
    with chdir(tmp_path):
        yield tmp_path


def frames(count: int, element: str = "Cu") -> list[object]:
    found = []
    for seed in range(count):
        atoms = bulk(element, cubic=True)
        atoms.rattle(0.05, seed=seed)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy() - 10, "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        found.append(atoms)
    return found


def test_files_report_and_status(capsys: pytest.CaptureFixture[str]) -> None:
    bad = frames(3)
    bad[1].calc.results["energy"] = np.nan  # type: ignore[attr-defined]
    write("a.traj", bad)
    assert run_command("data import", "a.traj", "missing", "--out", "new/my.lmdb", "--num-workers", 1) == 0
    report = json.loads(Path("new/my.lmdb.import.json").read_text())
    assert report["schema"] == "data-import/1"
    assert (report["read"], report["kept"]) == (3, 2)
    assert report["dropped"] == [
        {"file": "missing", "index": None, "reason": "there is no such file"},
        {"file": "a.traj", "index": 1, "reason": "the energy is not finite (NaN)"},
    ]
    for key in ("energy_kind", "tags_from", "fixed_from", "splits", "command", "commit", "seconds"):
        assert key in report
    assert len(OC20Lmdb("new/my.lmdb")) == 2
    printed = capsys.readouterr().out
    assert "a.traj, frame 1: the energy is not finite (NaN)" in printed
    assert "3 frames of 2 files read, 2 kept, 1 system" in printed


def test_parts_of_an_earlier_import_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    for element in ("Cu", "Ag", "Au", "Pt"):
        write(f"{element}.traj", frames(2, element))
    words = [
        "data import",
        "Cu.traj",
        "Ag.traj",
        "Au.traj",
        "Pt.traj",
        "--out",
        "my.lmdb",
        "--num-workers",
        1,
    ]
    assert run_command(*words, "--split", "source") == 0
    assert "units: energies in eV, forces in eV/A" in capsys.readouterr().out
    assert run_command(*words, "--overwrite", "--split", "source") == 0
    assert "earlier import" not in capsys.readouterr().out
    assert run_command(*words, "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "my.val.lmdb is of an earlier import, and its frames may be among those for training" in printed
    assert "my.test.lmdb is of an earlier import" in printed


def test_json_is_one_document_and_nothing_kept_has_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    status = run_command("data import", DATA / "OUTCAR.Al.gz", "--out", "my.lmdb", "--json")
    printed = capsys.readouterr()
    assert status == 2
    assert json.loads(printed.out)["kept"] == 0
    assert "error: no frame could be used, so nothing was written" in printed.err
    assert "OUTCAR.Al.gz, frame 0" in printed.err
    assert not list(Path().iterdir())


REFUSED: list[tuple[str, list[str], str]] = [
    ("an output that exists", ["a.traj", "--out", "old.lmdb"], "old.lmdb exists already"),
    ("an input", ["a.traj", "--out", "a.traj", "--overwrite"], "is read as input"),
    ("in the folder that is read", [".", "--out", "old.lmdb", "--overwrite"], "is read as input"),
    (
        "a rule",
        ["a.traj", "--out", "b.lmdb", "--adsorbate", "last two"],
        "'last two' for atoms is not understood",
    ),
    ("directions", ["a.traj", "--out", "b.lmdb", "--pbc", "T,T"], "three of T and F"),
    ("shares", ["a.traj", "--out", "b.lmdb", "--split", "system", "--fractions", "1,2"], "1 together"),
    ("a seed without a split", ["a.traj", "--out", "b.lmdb", "--seed", "1"], "--seed has no meaning"),
    (
        "a set of one system",
        ["a.traj", "--out", "b.lmdb", "--split", "system"],
        "1 system, too few for 3 parts",
    ),
    ("a condition", ["a.traj", "--out", "b.lmdb", "--select", "natoms>>5"], "'natoms>>5' is not understood"),
    (
        "a condition that none fulfils",
        ["a.traj", "--out", "b.lmdb", "--select", "natoms>500"],
        "leaves out all 3",
    ),
    ("nothing", ["empty", "--out", "b.lmdb"], "empty: the folder holds no results that ASE reads"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("a.traj", frames(3))
    Path("old.lmdb").write_text("old")
    Path("empty").mkdir()
    before = sorted((path.name, path.stat().st_size) for path in Path().iterdir())
    assert run_command("data import", *arguments, "--num-workers", 1) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted((path.name, path.stat().st_size) for path in Path().iterdir()) == before


def test_parts_of_a_split() -> None:
    for number, element in enumerate(("Cu", "Pt", "Ni", "Pd")):
        write(f"{number}.extxyz", frames(4, element))
    options = ["--split", "source", "--fractions", "0.5,0.25,0.25", "--seed", 1, "--num-workers", 1]
    assert run_command("data import", ".", "--out", "my.lmdb", *options) == 0
    splits = json.loads(Path("my.lmdb.import.json").read_text())["splits"]
    assert {name: part["frames"] for name, part in splits.items()} == {"train": 8, "val": 4, "test": 4}
    assert [Path(part["file"]).name for part in splits.values()] == ["my.lmdb", "my.val.lmdb", "my.test.lmdb"]
    assert all(len(OC20Lmdb(part["file"])) == part["frames"] for part in splits.values())


def test_other_commands_read_the_same_files(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.extxyz", frames(4))
    Path("runs").mkdir()
    write("runs/b.traj", frames(3, "Pt"))
    assert run_command("data inspect", "--data", "a.extxyz", "runs", "--out", "look", "--num-workers", 1) == 0
    assert json.loads(Path("look/inspection.json").read_text())["frames"] == 7
    command = ["--data", "a.extxyz", "--out", "references.npz", "--num-workers", 1]
    assert run_command("data references", *command) == 0
    assert np.load("references.npz")["coeff"][29] < 0

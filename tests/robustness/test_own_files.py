"""Odd and damaged files among results of DFT: the import ends with a report or a sentence."""

import gzip
import os
import sqlite3
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import write

from datasets_oc20 import OC20Lmdb
from datasets_oc20.errors import DataError
from datasets_oc20.own_data.importer import ImportOptions, import_files
from datasets_oc20.own_data.report import ImportReport

DATA = Path(__file__).parents[1] / "data/own_data"
pytestmark = pytest.mark.filterwarnings("ignore")
MANY = "10000000000"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> object:
    """The folder in which a test runs."""
    with chdir(tmp_path):
        yield tmp_path


def frames(count: int = 3) -> list[Atoms]:
    found = []
    for number in range(count):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=number)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy() - 10, "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        found.append(atoms)
    return found


def imported(*paths: object, out: str = "out.lmdb") -> ImportReport:
    files = [Path(str(path)) for path in paths]
    return import_files(files, out, ImportOptions(mixed=True), num_workers=1, progress=False)


def _other_database(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE notes (text TEXT)")


def _bomb(path: Path) -> None:
    content = gzip.decompress((DATA / "hfo2_OUTCAR_5.gz").read_bytes())
    path.write_bytes(gzip.compress(content)[:-4000])


ODD: list[tuple[str, Callable[[Path], object], str]] = [
    ("pipe.traj", os.mkfifo, "named pipe"),
    ("loop.traj", lambda path: path.symlink_to(path.name), "circle"),
    ("zero.traj", lambda path: path.symlink_to("/dev/zero"), "device"),
    ("gone.traj", lambda path: path.symlink_to("nowhere"), "o such file"),
    ("OUTCAR", lambda path: path.write_text(""), "is empty"),
    ("OUTCAR.1", lambda path: path.write_text("vasp.6\nTITEL\n"), "Incomplete OUTCAR"),
    ("notes.db", _other_database, "not one of ASE"),
    ("text.db", lambda path: path.write_text("no database\n" * 500), "not readable as a database"),
    ("text.traj", lambda path: path.write_text("no trajectory\n"), "text.traj"),
    ("many.extxyz", lambda path: path.write_text(f"{MANY}\nProperties=species:S:1:pos:R:3\nH 0 0 0\n"), MANY),
    (
        "later.extxyz",
        lambda path: path.write_text(f"1\n\nH 0 0 0\n{MANY}\n\nH 0 0 0\n"),
        "not a number of atoms",
    ),
    ("vasprun.xml", lambda path: path.write_text("<modeling><incar></incar>"), "not readable as vasp-xml"),
    ("x.gpw", lambda path: path.write_text("restart"), "restart file of GPAW"),
    ("x.lmdb", lambda path: path.write_text("no LMDB"), "x.lmdb"),
    ("x.py", lambda path: path.write_text("import os; os._exit(1)\n"), "does not know its format"),
    ("POSCAR", lambda path: write(path, bulk("Cu")), "it has no energy"),
    ("OUTCAR_cut.gz", _bomb, "truncated"),
    ("a\nb.extxyz", lambda path: path.write_text("x\n"), "not a number of atoms"),
]


@pytest.mark.parametrize(("name", "make", "reason"), ODD, ids=[repr(name) for name, *_ in ODD])
def test_an_odd_file_does_not_stop_the_others(name: str, make: Callable[[Path], object], reason: str) -> None:
    Path("data").mkdir()
    write("data/sound.traj", frames())
    make(Path("data", name))
    before = os.lstat(f"data/{name}").st_size
    report = imported(f"data/{name}", "data/sound.traj")
    assert report.kept == 3
    told = {Path(item.file).name: f"{item.file}: {item.reason}" for item in report.dropped}
    assert reason in told[name]
    assert imported("data", out="folder.lmdb").kept == 3
    assert os.lstat(f"data/{name}").st_size == before  # ASE would make a database of any SQLite file


def test_inputs_beside_an_output_are_not_trusted() -> None:
    Path("OUTCAR.gz").write_bytes((DATA / "hfo2_OUTCAR_5.gz").read_bytes())
    os.mkfifo("CONTCAR")
    Path("POSCAR").write_text("x\n1\n1 0 0\n0 1 0\n0 0 1\nCu\n99999999999\nDirect\n0 0 0\n")
    report = imported("OUTCAR.gz")
    assert report.kept == 1
    assert report.fixed_from == "none (no constraints)"


def _sound(name: str) -> bytes:
    if name.endswith(".db"):
        with connect(name) as database:
            for atoms in frames():
                database.write(atoms)
    elif name == "OUTCAR":
        Path(name).write_bytes(gzip.decompress((DATA / "li_relaxation_OUTCAR.gz").read_bytes()))
    elif name == "vasprun.xml":
        Path(name).write_bytes(gzip.decompress((DATA / "vasprun.bad.xml.gz").read_bytes()))
    elif name == "pw.out":
        Path(name).write_bytes(gzip.decompress((DATA / "Si.pwscf.out.gz").read_bytes()))
    else:
        write(name, frames())
    content = Path(name).read_bytes()
    Path(name).unlink()
    return content


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj", "a.db", "OUTCAR", "vasprun.xml", "pw.out"])
def test_damaged_files_end_in_a_report(name: str) -> None:
    sound, random = _sound(name), np.random.default_rng(0)
    for number in range(15):
        content = bytearray(sound)
        for place in random.integers(len(content), size=random.integers(1, 8)):
            content[place] = random.integers(256)
        Path(name).write_bytes(content[: random.integers(1, 2 * len(content))])
        try:
            report = imported(name, out=f"{number}.lmdb")
        except DataError:  # such as an energy that no record can hold
            continue
        assert report.kept + len(report.dropped) > 0
        assert all(item.reason and "\n" not in item.reason for item in report.dropped)
        if report.kept:
            assert all(np.isfinite(record.energy.item()) for record in OC20Lmdb(f"{number}.lmdb"))

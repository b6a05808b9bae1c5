"""Settings of DFT calculations: read from outputs, trajectories, databases and LMDB files, and compared."""

import gzip
import time
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io.trajectory import Trajectory
from own_files import DATA, in_folder, in_parts, labelled, run, slab, trajectory  # noqa: F401

from datasets_oc20 import OC20Lmdb
from datasets_oc20.errors import DataError
from datasets_oc20.own_data.dft_settings import espresso_calculation, outcar_settings
from datasets_oc20.own_data.importer import import_files
from datasets_oc20.own_data.opening import open_dataset

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("in_folder")]

HUBBARD = """
     Simplified LDA+U calculation (l_max = 1) with parameters (eV):
     atomic species    L          U    alpha       J0     beta
        Si             1     4.6000   0.0000   0.0000   0.0000

"""


def espresso(**changes: str) -> list[str]:
    """Lines of an output of Quantum ESPRESSO, with text put behind the table of species, or replaced."""
    text = gzip.decompress((DATA / "Si.pwscf.out.gz").read_bytes()).decode()
    head, mark, rest = text.partition("     24 Sym. Ops.")
    text = head + changes.get("behind", "") + mark + rest
    return text.replace(
        "electrons       =         8.00", changes.get("electrons", "electrons = 8.00")
    ).splitlines(keepends=True)


ESPRESSO = [
    (HUBBARD, "+U of Si (eV)", 0.0, 4.6),
    ("     U(Si-3p)  =  4.6000\n", "+U of Si (eV)", 0.0, 4.6),
    (
        "     Starting magnetic structure \n     atomic species   magnetization\n",
        "spin",
        "not polarised",
        "polarised",
    ),
    ("     DFT-D3 Dispersion         =      -0.05 Ry\n", "dispersion", "none", "DFT-D3 Dispersion"),
]


@pytest.mark.parametrize(("lines", "name", "plain", "changed"), ESPRESSO, ids=["old +U", "+U", "spin", "D3"])
def test_settings_of_quantum_espresso_differ_from_their_defaults(
    lines: str, name: str, plain: Any, changed: Any
) -> None:
    settings = [espresso_calculation(iter(espresso(behind=text))).settings for text in ("", lines)]
    assert [table[name] for table in settings] == [plain, changed]
    assert {key for key in settings[0] if settings[0][key] != settings[1][key]} == {name}


def test_charged_cells_of_quantum_espresso_are_told() -> None:
    Path("neutral.out").write_text("".join(espresso()))
    Path("charged.out").write_text("".join(espresso(electrons="electrons = 7.00")))
    assert not [text for text in run("neutral.out", out="a.lmdb").notices if "charged" in text]
    (told,) = [text for text in run("charged.out", out="b.lmdb").notices if "charged" in text]
    assert "charged.out, +1 e" in told


def test_a_damaged_line_of_an_outcar_takes_no_time() -> None:
    lines = [f"   ZVAL   =  {'1' * 60}x\n", f"   ions per type =  {'2 ' * 60}x\n"]
    begin = time.perf_counter()
    outcar_settings(lines)
    assert time.perf_counter() - begin < 1.0


def by_calculator(frames: list[Atoms], name: str, **parameters: Any) -> list[Atoms]:
    """The frames with a calculator of that name and those parameters."""
    for atoms in frames:
        atoms.calc.name = name
        atoms.calc.parameters = parameters
    return frames


def to_trajectory(path: str, frames: list[Atoms]) -> None:
    """Write frames with the parameters of their calculators, as calculations do."""
    with Trajectory(path, "w") as file:
        for atoms in frames:
            parameters = atoms.calc.parameters
            atoms.calc.todict = lambda parameters=parameters: parameters
            file.write(atoms)


def to_database(path: str, frames: list[Atoms]) -> None:
    """Write frames with the parameters of their calculators."""
    with connect(path) as database:
        for atoms in frames:
            parameters = atoms.calc.parameters
            atoms.calc.todict = lambda parameters=parameters: parameters
            database.write(atoms)


WRITERS = {"traj": to_trajectory, "db": to_database}
DIFFERENT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"xc": "PBE"}, {"xc": "rpbe"}, "functional is PBE in"),
    ({"encut": 400.0}, {"encut": 500}, r"cut-off \(eV\) is 400 in"),
    (
        {"ldau_luj": {"Pt": {"L": 2, "U": 3.0, "J": 0.0}}},
        {"ldau_luj": {"Pt": {"L": 2, "U": 0.0, "J": 0.0}}},
        "U of Pt",
    ),
]


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize(("one", "other", "message"), DIFFERENT, ids=["functional", "cut-off", "+U"])
def test_parameters_that_ase_keeps_are_compared(
    one: dict[str, Any], other: dict[str, Any], message: str, ending: str
) -> None:
    frames = trajectory(slab(), 3)
    for name, parameters in (("a", one), ("b", other)):
        WRITERS[ending](f"{name}.{ending}", by_calculator(frames, "vasp", **parameters))
    with pytest.raises(DataError, match=message):
        run(f"a.{ending}", f"b.{ending}")
    assert run(f"a.{ending}", f"a.{ending}").settings["code"] == "VASP"


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.usefixtures("in_parts")
def test_rows_of_one_file_are_compared(num_workers: int) -> None:
    frames = by_calculator(trajectory(slab(), 3), "vasp", xc="PBE")
    frames += by_calculator(trajectory(slab("Cu"), 3), "espresso", input_data={"system": {"ecutwfc": 40}})
    to_database("a.db", frames)
    with pytest.raises(DataError, match=r"code is VASP in a\.db and Quantum ESPRESSO in a\.db, frame 3"):
        import_files(["a.db"], "out.lmdb", num_workers=num_workers, progress=False)


def test_an_import_keeps_settings_that_later_readers_compare() -> None:
    for name, functional in (("pbe", "PBE"), ("rpbe", "RPBE")):
        to_trajectory(f"{name}.traj", by_calculator(trajectory(slab(), 3), "vasp", xc=functional))
        run(f"{name}.traj", out=f"{name}.lmdb")
    assert dict(OC20Lmdb("pbe.lmdb").settings)["pbe.lmdb"]["functional"] == "PBE"
    for paths in (["pbe.lmdb", "rpbe.lmdb"], ["pbe.lmdb", "rpbe.traj"]):
        with pytest.raises(DataError, match=r"functional is PBE in pbe\.lmdb and RPBE in rpbe"):
            open_dataset(paths)
    assert len(open_dataset(["pbe.lmdb", "pbe.traj"])) == 6
    with pytest.raises(DataError, match="functional is PBE in"):
        run("pbe.lmdb", "rpbe.lmdb", out="both.lmdb")


def test_parameters_of_odd_kinds_say_nothing() -> None:
    atoms = labelled(slab())
    calc = SinglePointCalculator(atoms, **atoms.calc.results)
    atoms.calc = calc
    to_trajectory(
        "a.traj", by_calculator([atoms], "unknown", xc=7, encut=True, ldau_luj=[1], mode={"ecut": 340})
    )
    assert run("a.traj").settings == {"cut-off (eV)": 340.0}

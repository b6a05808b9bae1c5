"""The whole import: what is kept, what is dropped and why, and what is refused."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import read, write
from own_files import (  # noqa: F401
    DATA,
    Change,
    crystals,
    in_folder,
    in_parts,
    labelled,
    run,
    slab,
    trajectory,
)

from datasets_oc20 import OC20Lmdb, write_lmdb
from datasets_oc20.errors import DataError
from datasets_oc20.own_data import source_worker
from datasets_oc20.own_data.checks import Place, duplicates
from datasets_oc20.own_data.discovery import Source
from datasets_oc20.own_data.frame_facts import FrameFacts
from datasets_oc20.own_data.importer import import_files
from datasets_oc20.own_data.reading import SourceFile
from datasets_oc20.own_data.selection import FrameSelection
from datasets_oc20.own_data.splits import SplitOptions

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("in_folder")]


# file, frames kept, reasons of what is dropped by index (None: the file)
RAW: list[tuple[str, int, list[tuple[int | None, str]]]] = [
    ("hfo2_OUTCAR_5.gz", 1, []),
    ("li_relaxation_OUTCAR.gz", 3, []),
    ("vasprun.md.xml.gz", 10, []),
    ("vasprun.bad.xml.gz", 1, [(1, "the file ends before the calculation did")]),
    ("vasprun.wrong_sp.xml.gz", 0, [(None, "there is no element 'Z'")]),
    ("OUTCAR.Al.gz", 0, [(0, "positions")]),
    ("vasprun.unconverged.xml.gz", 0, [(i, "did not converge within 100 (NELM)") for i in range(5)]),
    ("Si.pwscf.out.gz", 1, []),
    ("../../../data/own_data/ch3_cu111.extxyz", 22, []),
    ("../../../data/own_data/oxides.db", 295, []),
    ("README.md", 0, [(None, "ASE does not know its format")]),
]


@pytest.mark.parametrize(("name", "kept", "dropped"), RAW, ids=[Path(name).name for name, *_ in RAW])
def test_outputs_of_codes_are_imported_or_named(
    name: str, kept: int, dropped: list[tuple[int | None, str]]
) -> None:
    report = run(DATA / name)
    assert report.kept == kept
    assert [item.index for item in report.dropped] == [index for index, _ in dropped]
    for item, (_, reason) in zip(report.dropped, dropped, strict=True):
        assert reason in item.reason
        assert item.file == str(DATA / name)
    assert Path("out.lmdb").exists() == (kept > 0)
    if kept:
        assert len(OC20Lmdb("out.lmdb")) == kept
    assert not [path for path in Path().iterdir() if path.name != "out.lmdb"]


def test_an_outcar_has_ase_s_numbers_and_its_functional() -> None:
    report = run(DATA / "hfo2_OUTCAR_5.gz", DATA / "hfo2_OUTCAR_9.gz")
    assert report.settings["functional"] == "SCAN"  # over PBE potentials
    assert report.settings["cut-off (eV)"] == 500.0
    for record, name in zip(OC20Lmdb("out.lmdb"), ("hfo2_OUTCAR_5.gz", "hfo2_OUTCAR_9.gz"), strict=False):
        atoms = read(DATA / name, format="vasp-out")
        assert record.energy.item() == atoms.get_potential_energy()
        assert np.allclose(record.forces, atoms.get_forces(), atol=1e-6)
        assert np.allclose(record.stress[0], atoms.get_stress(voigt=False), atol=1e-7)
        assert record.sid.startswith("Hf4O8")


def test_different_settings_are_refused_and_named() -> None:
    with pytest.raises(DataError) as refused:
        run(DATA / "hfo2_OUTCAR_5.gz", DATA / "li_relaxation_OUTCAR.gz")
    for part in ("functional is SCAN in", "hfo2_OUTCAR_5.gz", "PBE in", "li_relaxation_OUTCAR.gz", "--mixed"):
        assert part in str(refused.value)
    assert not list(Path().iterdir())
    report = run(DATA, mixed=True)
    assert report.kept == 18
    assert report.isolated_atoms == []  # Li is a crystal of one atom
    assert any("cut-off (eV) is 500" in text for text in report.differences)
    assert {Path(item.file).name for item in report.dropped} == {
        *("OUTCAR.Al.gz", "Si.pwscf.out.gz", "vasprun.bad.xml.gz", "vasprun.unconverged.xml.gz"),
        "vasprun.wrong_sp.xml.gz",
    }


def test_the_result_does_not_depend_on_the_number_of_processes() -> None:
    files = []
    for number in range(5):
        files.append(f"{number}.extxyz")
        write(files[-1], trajectory(slab(seed=number), 3))
    import_files(files, "one.lmdb", num_workers=1, progress=False)
    import_files(files, "two.lmdb", num_workers=2, progress=False)
    one, two = OC20Lmdb("one.lmdb"), OC20Lmdb("two.lmdb")
    assert len(one) == len(two) == 15
    for first, second in zip(one, two, strict=True):
        assert first.sid == second.sid
        assert first.energy == second.energy


def _many_frames(name: str) -> None:
    """23 frames of three systems, one of them without an energy; in a database rows are missing, too."""
    frames = [atoms for seed, count in enumerate((9, 4, 10)) for atoms in trajectory(slab(seed=seed), count)]
    if name.endswith(".db"):
        with connect(name) as database:
            for atoms in [*frames, *frames[:2]]:
                database.write(atoms, name="one")
            database.delete([1, 7])
    elif name.endswith(".lmdb"):
        write("source.traj", frames)
        import_files(["source.traj"], name, num_workers=1, progress=False)
    else:
        frames[12].calc = None
        write(name, frames)
    if name == "damaged.extxyz":
        lines = Path(name).read_text().splitlines(keepends=True)
        lines[7 * 14 + 5] = "Pt 1 2 x 0 0 0 0\n"  # a frame has 14 lines
        Path(name).write_text("".join(lines)[:-40])
    elif name == "gap.extxyz":
        text = Path(name).read_text().splitlines(keepends=True)
        Path(name).write_text("".join([*text[: 14 * 8], "\n", *text[14 * 8 :]]))


@pytest.mark.parametrize("name", ["a.extxyz", "damaged.extxyz", "gap.extxyz", "a.traj", "a.db", "a.lmdb"])
@pytest.mark.usefixtures("in_parts")
def test_a_large_file_is_read_by_several_processes_with_the_same_result(name: str) -> None:
    _many_frames(name)
    one = import_files([name], "one.lmdb", num_workers=1, progress=False)
    two = import_files([name], "two.lmdb", num_workers=2, progress=False)
    assert len(SourceFile(Path(name)).parts(4)) >= 2
    assert one.dropped == two.dropped
    assert one.kept == two.kept >= 8
    assert one.to_record() | {"out": ""} == two.to_record() | {"out": ""}
    for first, second in zip(OC20Lmdb("one.lmdb"), OC20Lmdb("two.lmdb"), strict=True):
        assert (first.sid, first.fid, first.energy) == (second.sid, second.fid, second.energy)
        assert torch.equal(first.pos, second.pos)
        assert torch.equal(first.forces, second.forces)


def test_large_outputs_that_cannot_be_divided_are_read_side_by_side() -> None:
    """A folder of large OUTCARs would keep one core busy if each waited for the one before."""
    _many_frames("a.extxyz")
    shutil.copy(DATA / "hfo2_OUTCAR_5.gz", "OUTCAR.gz")
    Path("OUTCAR").write_bytes(gzip.decompress(Path("OUTCAR.gz").read_bytes()))
    large = source_worker.LARGE_SOURCE

    def is_divided(name: str, size: int) -> bool:
        return source_worker.is_divided(Source(0, name, "", (Path(name),), size))

    assert is_divided("a.extxyz", large)
    assert not is_divided("a.extxyz", large - 1)
    assert not any(is_divided(name, large) for name in ("OUTCAR", "OUTCAR.gz", "absent.extxyz"))


def _selective(folder: Path) -> None:
    atoms = read(DATA / "hfo2_OUTCAR_5.gz", format="vasp-out")
    atoms.set_constraint(__import__("ase.constraints", fromlist=["FixAtoms"]).FixAtoms([0, 5]))
    write(folder / "CONTCAR", atoms, format="vasp")


def test_fixed_atoms_come_from_the_file_beside_an_outcar() -> None:
    for name in ("a", "b"):
        Path("calculations", name).mkdir(parents=True)
        shutil.copy(DATA / "hfo2_OUTCAR_5.gz", f"calculations/{name}/OUTCAR.gz")
    _selective(Path("calculations/a"))
    report = run("calculations")
    records = list(OC20Lmdb("out.lmdb"))
    assert [record.fixed.nonzero().flatten().tolist() for record in records] == [[0, 5], []]
    assert records[0].tags.tolist() == [0, 1, 1, 1, 1, 0, *[1] * 6]
    assert "CONTCAR beside" in report.fixed_from
    assert len(report.duplicates) == 1


def test_one_of_two_outputs_of_a_calculation_is_read() -> None:
    Path("run").mkdir()
    shutil.copy(DATA / "vasprun.bad.xml.gz", "run/vasprun.xml.gz")
    shutil.copy(DATA / "li_relaxation_OUTCAR.gz", "run/OUTCAR.gz")  # longer, and whole
    Path("run/INCAR").write_text("ENCUT = 500\n")
    report = run("run")
    assert report.kept == 3
    assert report.files == 1
    assert "INCAR" in " ".join(report.notices)


FORMATS = ["a.extxyz", "a.extxyz.gz", "a.extxyz.bz2", "a.xyz.xz", "a.traj", "a.db", "a.json"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(name: str) -> None:
    frames = trajectory(slab(), 3)
    if name.endswith(".db"):
        with connect(name) as database:
            for atoms in frames:
                database.write(atoms)
    else:
        write(name, frames if not name.endswith(".json") else frames[:1])
    report = run(name)
    records = list(OC20Lmdb("out.lmdb"))
    assert report.kept == len(records) == (1 if name == "a.json" else 3)
    for record, atoms in zip(records, frames, strict=False):
        assert record.energy.item() == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        assert np.allclose(record.forces, atoms.calc.results["forces"], atol=1e-6)
        assert record.fixed.tolist() == [True] * 8 + [False] * 4
        assert record.tags.tolist() == [0] * 8 + [1] * 4
    assert report.fixed_from == "constraints"


def test_lmdb_files_are_imported_with_their_kind() -> None:
    structures = trajectory(slab(), 3)
    write_lmdb("adsorption.lmdb", structures, "adsorption")
    write("total.extxyz", structures)
    assert run("adsorption.lmdb").energy_kind == "adsorption"
    with pytest.raises(DataError, match=r"adsorption\.lmdb declares adsorption .* total\.extxyz"):
        run("adsorption.lmdb", "total.extxyz", out="b.lmdb")


def test_links_to_folders_are_followed_once() -> None:
    Path("here/deep").mkdir(parents=True)
    Path("elsewhere").mkdir()
    write("elsewhere/a.traj", trajectory(slab(), 2))
    write("here/deep/b.traj", trajectory(slab("Cu"), 3))
    Path("here/linked").symlink_to(Path("elsewhere").resolve())
    Path("here/deep/circle").symlink_to(Path("here").resolve())
    Path("here/again").symlink_to(Path("elsewhere").resolve())
    Path("empty").mkdir()
    report = run("here", "empty")
    assert report.kept == 5
    assert [(item.file, item.index) for item in report.dropped] == [("empty", None)]
    assert "holds no results" in report.dropped[0].reason


def test_notices_count_the_frames_that_are_kept() -> None:
    good, bad = trajectory(slab(), 4), trajectory(slab("Cu"), 8)
    for atoms in bad:
        atoms.calc.results["forces"] /= 51.42  # dropped with the whole file, after it was read
    good[1].calc.results["forces"][2] = [2e4, 0, 0]
    bad[0].set_constraint()
    write("a.traj", good)
    write("b.traj", bad)
    report = run("a.traj", "b.traj")
    assert report.kept == 3
    assert any(text.startswith("3 of 3 frames: no atom is marked") for text in report.notices)
    assert (report.tags_from, report.fixed_from) == ("constraints", "constraints")
    assert "b.traj, frames 0 to 7: energies change" in report.to_text()


def test_forces_under_another_name_are_pointed_out() -> None:
    write("a.extxyz", trajectory(slab(), 3))
    text = Path("a.extxyz").read_text()
    Path("a.extxyz").write_text(text.replace("forces:R:3", "REF_forces:R:3"))
    report = run("a.extxyz")
    assert report.targets == []
    assert any("if these are the forces, give --forces-key REF_forces" in text for text in report.notices)
    report = run("a.extxyz", forces_key="REF_forces", out="b.lmdb")
    assert report.targets == ["forces"]


def test_a_rule_that_no_atom_fulfils_is_said() -> None:
    from datasets_oc20.own_data.atom_rules import AtomRule

    write("a.traj", trajectory(slab(), 2))
    report = run("a.traj", adsorbate=AtomRule("z>99"), fixed=AtomRule("z<0"))
    text = " ".join(report.notices)
    assert "no atom fulfils the rule of --adsorbate" in text
    assert "no atom fulfils the rule of --fixed" in text
    report = run("a.traj", adsorbate=AtomRule("none"), fixed=AtomRule("none"), out="b.lmdb")
    assert not any("fulfils" in text for text in report.notices)


def test_forces_of_all_frames_that_are_far_too_large_are_pointed_out() -> None:
    frames = [labelled(slab(seed=seed)) for seed in range(3)]
    for atoms in frames:
        atoms.calc.results["forces"] *= 1000
    write("a.extxyz", frames)
    report = run("a.extxyz")
    assert any("3 of 3 frames have forces above 50 eV/Å" in text for text in report.notices)


def test_an_outcar_with_a_title_in_another_encoding_is_read() -> None:
    import gzip

    content = gzip.decompress((DATA / "hfo2_OUTCAR_5.gz").read_bytes())
    Path("OUTCAR").write_bytes(content.replace(b"HfO2_p21c", "HfO2 für Käse".encode("latin-1"), 1))
    assert run("OUTCAR").kept == 1


def test_a_cut_outcar_names_the_step_it_lost() -> None:
    import gzip

    text = gzip.decompress((DATA / "li_relaxation_OUTCAR.gz").read_bytes()).decode()
    end = [match.start() for match in re.finditer("Iteration    3", text)][1]
    Path("OUTCAR").write_text(text[:end])
    report = run("OUTCAR")
    assert report.kept == 2
    assert [(item.index, item.reason) for item in report.dropped] == [
        (2, "the file ends inside this ionic step")
    ]
    steps = [match.start() for match in re.finditer("aborting loop because EDIFF", text)]
    unconverged = (
        text[: steps[1]] + "aborting loop EDIFF was not reached (unconverged)" + text[steps[1] + 27 :]
    )
    Path("OUTCAR").write_text(unconverged)
    report = run("OUTCAR", out="b.lmdb")
    assert [(item.index, item.reason[:35]) for item in report.dropped] == [
        (1, "the electronic steps did not conver")
    ]


def _scaled(factor: float, what: str) -> Change:
    def change(frames: list[Atoms]) -> list[Atoms]:
        for atoms in frames:
            atoms.calc.results[what] = atoms.calc.results[what] * factor
        return frames

    return change


UNITS: list[tuple[Change, str]] = [
    (_scaled(1 / 25.711, "forces"), "forces were in Ry/bohr (--forces-unit Ry/bohr)"),
    (_scaled(1 / 51.422, "forces"), "forces were in Ha/bohr"),
    (_scaled(23.06, "forces"), "forces were in kcal/mol/A"),
    (_scaled(1 / 27.211, "energy"), "energies were in Ha"),
    (_scaled(1 / 12, "energy"), "energies per atom (of 12)"),
    (_scaled(-1, "forces"), "gradients, of the opposite sign"),
]


@pytest.mark.parametrize(("change", "meaning"), UNITS)
def test_other_units_are_found_along_a_trajectory(change: Change, meaning: str) -> None:
    frames = trajectory(slab(amount=0.15), 10)
    write("right.traj", frames)
    assert run("right.traj", out="right.lmdb").kept == 10
    write("wrong.traj", change(frames))
    report = run("wrong.traj")
    assert report.kept == 0
    assert meaning in report.dropped[0].reason
    assert report.dropped[0].file == "wrong.traj"
    assert run("wrong.traj", checked=False).kept == 10


def test_units_and_keys_that_are_given() -> None:
    frames = trajectory(slab(), 3)
    renamed = []
    for atoms in frames:
        other = atoms.copy()
        other.info["REF_energy"] = atoms.get_potential_energy() / 27.211386
        other.arrays["REF_forces"] = atoms.calc.results["forces"] / 51.422067
        renamed.append(other)
    write("a.extxyz", renamed)
    assert "--energy-key REF_energy" in run("a.extxyz").dropped[0].reason
    keys = {"energy_key": "REF_energy", "forces_key": "REF_forces"}
    units = {"energy_unit": "Ha", "forces_unit": "Ha/bohr"}
    assert run("a.extxyz", **keys, **units).kept == 3
    for record, atoms in zip(OC20Lmdb("out.lmdb"), frames, strict=False):
        assert record.energy.item() == pytest.approx(atoms.get_potential_energy(), rel=1e-6)
        assert np.allclose(record.forces, atoms.calc.results["forces"], atol=1e-5)
    report = run("a.extxyz", energy_key="energy_of_another_name", out="b.lmdb")
    assert report.kept == 0
    assert "there is no energy_of_another_name (its keys are" in report.dropped[0].reason


def test_the_energy_that_forces_are_of() -> None:
    frames = trajectory(slab(), 2)
    for atoms in frames:
        atoms.calc.results["free_energy"] = atoms.calc.results["energy"] - 0.5
    write("a.traj", frames)
    energies = []
    for energy in ("energy", "free_energy"):
        run("a.traj", energy=energy, out=f"{energy}.lmdb")
        energies.append(OC20Lmdb(f"{energy}.lmdb")[0].energy.item())
    assert energies[0] - energies[1] == pytest.approx(0.5)


def _two_kinds() -> list[Atoms]:
    frames = trajectory(slab(), 4, amount=0.3)
    for number, atoms in enumerate(frames):
        atoms.calc.results["energy"] += -300.0 if number else 0.0
    return frames


def _per_atom_among_totals() -> list[Atoms]:
    frames = [labelled(bulk("Cu", cubic=True).repeat(2), energy=-120.0 - n) for n in range(4)]
    frames[2].calc.results["energy"] /= 32
    return frames


def _all_per_atom() -> list[Atoms]:
    return [labelled(atoms, energy=-3.7 + 0.01 * n) for n, atoms in enumerate(crystals((2, 3, 4, 5)))]


def _adsorption_among_totals() -> list[Atoms]:
    return [
        labelled(slab("Pt"), energy=-70.0),
        labelled(slab("Cu"), energy=-0.4),
        labelled(slab("Ni"), energy=-65.0),
    ]


REFUSED: list[tuple[Callable[[], list[Atoms]], str]] = [
    (_two_kinds, r"frame 0 has .* eV and .*frame \d with the same atoms"),
    (_per_atom_among_totals, "the first is the second divided by 32 atoms"),
    (_all_per_atom, "they are per atom; multiply each by its number of atoms .a factor of 8"),
    (_adsorption_among_totals, "frame 1 has -0.4 eV for 12 atoms .* two kinds of energy"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_energies_of_two_kinds_are_refused(make: Callable[[], list[Atoms]], message: str) -> None:
    write("a.traj", make())
    with pytest.raises(DataError, match=message):
        run("a.traj", checked=False)
    assert not Path("out.lmdb").exists()
    assert run("a.traj", checked=False, mixed=True).kept == len(read("a.traj", ":"))


def test_what_is_unusual_is_listed_and_kept() -> None:
    frames = [labelled(slab("Pt", seed=seed, amount=0.02)) for seed in range(8)]
    frames.append(frames[2].copy())
    frames[-1].calc = SinglePointCalculator(frames[-1], **frames[2].calc.results | {"energy": 5.0})
    frames[4].calc.results["forces"][9] = [60.0, 0, 0]
    frames[5].calc.results["energy"] += 30.0
    frames[0].set_initial_magnetic_moments(np.ones(12))
    frames[0].calc.results["magmoms"] = np.ones(12)
    frames[1].info["charge"] = 1
    write("a.extxyz", frames)
    report = run("a.extxyz", checked=False)
    assert report.kept == 9
    assert [(item["index"], item["other_index"]) for item in report.duplicates] == [(8, 2)]
    assert report.duplicates[0]["energy_difference_eV"] == pytest.approx(
        5.0 - frames[2].get_potential_energy()
    )
    reasons = {item["index"]: item["reason"] for item in report.outliers}
    assert "a force of 60" in reasons[4]
    assert "off the linear fit" in reasons[5]
    text = " ".join(report.notices)
    assert "magnetic moments are not kept" in text
    assert "state a charge" in text


def test_tags_and_fixed_atoms_by_rule_and_default() -> None:
    from ase.build import add_adsorbate

    from datasets_oc20.own_data.atom_rules import AtomRule

    atoms = slab()
    add_adsorbate(atoms, molecule("CO"), 2.0)
    layers = atoms.copy()
    layers.set_tags([3] * 4 + [2] * 4 + [1] * 4 + [0] * 2)
    ours = atoms.copy()
    ours.set_tags([0] * 8 + [1] * 4 + [2] * 2)
    for name, structure in (("none", atoms), ("layers", layers), ("ours", ours)):
        write(f"{name}.traj", labelled(structure))
    marked = [0] * 8 + [1] * 4 + [2] * 2
    unmarked = [0] * 8 + [1] * 6
    cases: list[tuple[str, dict[str, object], list[int], str]] = [
        ("none", {}, unmarked, "constraints"),
        ("layers", {}, unmarked, "constraints"),
        ("ours", {}, marked, "tags of the file"),
        ("none", {"adsorbate": AtomRule("CO")}, marked, "--adsorbate 'CO', others from constraints"),
        (
            "layers",
            {"adsorbate": AtomRule("last 2")},
            marked,
            "--adsorbate 'last 2', others from constraints",
        ),
        (
            "ours",
            {"adsorbate": AtomRule("none")},
            unmarked,
            "--adsorbate 'none', others from tags of the file",
        ),
        ("none", {"fixed": AtomRule("z<9")}, [0] * 4 + [1] * 10, "constraints"),
    ]
    for number, (name, options, tags, origin) in enumerate(cases):
        report = run(f"{name}.traj", out=f"{number}.lmdb", **options)
        assert OC20Lmdb(f"{number}.lmdb")[0].tags.tolist() == tags, name
        assert report.tags_from == origin
        assert any("layer numbers" in text for text in report.notices) == (name == "layers")
    assert OC20Lmdb("6.lmdb")[0].fixed.sum() == 4


def test_molecules_and_periodic_directions() -> None:
    write("a.extxyz", labelled(molecule("CH4") + Atoms("Pt", [[0, 0, 5.0]])))
    report = run("a.extxyz")
    assert "without a cell were taken as molecules" in " ".join(report.notices)
    report = run("a.extxyz", pbc=(True, True, False), out="b.lmdb")
    assert "no lattice vector there; set the cell, or --pbc" in report.dropped[0].reason
    box = slab()
    box.pbc = False
    write("c.extxyz", labelled(box))
    assert "pbc F F F" in " ".join(run("c.extxyz", out="c.lmdb").notices)
    assert not any("pbc F F F" in text for text in run("c.extxyz", pbc=(True,) * 3, out="d.lmdb").notices)
    assert OC20Lmdb("d.lmdb")[0].pbc.all()


def test_energies_without_forces_and_stress_of_some() -> None:
    bare = [labelled(atoms, forces=None) for atoms in crystals()]
    write("a.traj", bare)
    report = run("a.traj")
    assert report.kept == 3
    assert report.targets == []
    assert "only be trained on the energies" in " ".join(report.notices)
    some = crystals()
    some[0].calc.results["stress"] = np.arange(6.0)
    write("b.traj", some)
    report = run("b.traj", out="b.lmdb")
    assert report.targets == ["forces"]
    assert "stress" not in OC20Lmdb("b.lmdb")[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stress_key": "my_stress", "stress_unit": "GPa"}, 0.1 / 160.21766),
        ({"stress_key": "my_stress", "stress_unit": "kbar", "stress_sign": "compression"}, -0.1 / 1602.1766),
        ({"stress_key": "virial"}, -0.1),
    ],
)
def test_units_and_signs_of_the_stress(settings: dict[str, object], expected: float) -> None:
    atoms = crystals((2,))[0]
    atoms.info["my_stress"] = np.full(9, 0.1)
    atoms.info["virial"] = np.full(9, 0.1) * atoms.get_volume()
    write("a.extxyz", atoms)
    run("a.extxyz", **settings)
    assert np.allclose(OC20Lmdb("out.lmdb")[0].stress, expected, rtol=1e-4)


def test_splits_never_divide_a_trajectory() -> None:
    for number, element in enumerate(["Pt", "Pt", "Cu", "Ni", "Pd", "Ag"]):
        write(f"{number}.extxyz", trajectory(slab(element, seed=number), 5))
    files = [f"{number}.extxyz" for number in range(6)]
    for by in ("system", "composition", "source"):
        split = SplitOptions(by, (0.5, 0.3, 0.2), seed=3)
        report = run(*files, out=f"{by}.lmdb", split=split)
        parts = {name: OC20Lmdb(part["file"]) for name, part in report.splits.items()}
        assert sum(map(len, parts.values())) == 30
        names = {name: {record.sid for record in part} for name, part in parts.items()}
        assert sum(map(len, names.values())) == len(set.union(*names.values())) == 6
        assert all(len(part) % 5 == 0 for part in parts.values())
        if by == "composition":
            platinum = [{"0", "1"} & {sid.rpartition("/")[2] for sid in sids} for sids in names.values()]
            assert sorted(map(len, platinum)) == [0, 0, 2]
    again = run(*files, out="again.lmdb", split=SplitOptions("system", (0.5, 0.3, 0.2), seed=3))
    assert {name: part["frames"] for name, part in again.splits.items()} == {
        "train": 15,
        "val": 10,
        "test": 5,
    }
    with pytest.raises(DataError, match="are of 1 source file, too few for 2 parts"):
        run("0.extxyz", out="one.lmdb", split=SplitOptions("source", (0.5, 0.5)))
    assert not Path("one.lmdb").exists()


@pytest.mark.parametrize("name", ["a.extxyz", "a.db", "a.traj"])
def test_a_trajectory_with_gaps_or_other_frames_between_is_one_system(name: str) -> None:
    frames = trajectory(slab("Pt"), 12)
    for number in range(4, 8):
        moved = frames[number].copy()
        moved.positions[9, 2] += 1.2  # frames between them are missing
        frames[number] = labelled(moved)
    frames[6:6] = trajectory(slab("Cu"), 1)
    frames.append(trajectory(slab("Cu", seed=2), 1)[0])
    write(name, frames)
    run(name)
    names = [record.sid for record in OC20Lmdb("out.lmdb")]
    copper = {names.pop(6), names.pop()}
    assert len({*names}) == len(copper) == 1
    assert not copper & {*names}
    with pytest.raises(DataError, match="are of 2 systems, too few for 3 parts"):
        run(name, out="split.lmdb", split=SplitOptions("system", (0.6, 0.2, 0.2)))


def test_relaxations_of_the_same_atoms_in_several_files_are_several_systems() -> None:
    for number in range(3):
        write(f"{number}.extxyz", trajectory(slab("Pt", seed=number), 4))
    assert run("0.extxyz", "1.extxyz", "2.extxyz").systems == 3


def test_copies_in_several_parts_of_a_split_are_told() -> None:
    frames = trajectory(slab("Pt"), 3)
    for name in ("a.extxyz", "copy.extxyz"):
        write(name, frames)
    report = run("a.extxyz", "copy.extxyz", split=SplitOptions("source", (0.5, 0.5)))
    (told,) = [text for text in report.notices if "one part of the split" in text]
    assert told.startswith("3 structures of one part of the split are in another one, too")
    write("b.extxyz", trajectory(slab("Cu"), 3))
    report = run("a.extxyz", "b.extxyz", out="other.lmdb", split=SplitOptions("source", (0.5, 0.5)))
    assert not [text for text in report.notices if "one part of the split" in text]


def test_parts_of_an_earlier_import_are_left_out_of_a_folder() -> None:
    for number, element in enumerate(["Pt", "Cu", "Ni"]):
        write(f"{number}.extxyz", trajectory(slab(element, seed=number), 3))
    run(".", split=SplitOptions("system", (0.4, 0.3, 0.3)))
    assert Path("out.test.lmdb").exists()
    Path("out.lmdb.import.json").write_text("{}")  # the report of the command
    assert run(".", out="again.lmdb").kept == 9


def test_splits_by_a_key() -> None:
    frames = [labelled(slab(element, seed)) for seed in range(4) for element in ("Pt", "Cu")]
    for number, atoms in enumerate(frames):
        atoms.info["campaign"] = f"c{number // 2}"
    write("a.extxyz", frames)
    report = run("a.extxyz", group_key="campaign", split=SplitOptions("key", (0.5, 0.5)))
    assert report.splits["train"]["frames"] == report.splits["val"]["frames"] == 4
    write("b.extxyz", frames[::2])  # near copies of each other, one after the other
    with pytest.raises(DataError, match="1 group of a value of the group key and the trajectories in it"):
        run("b.extxyz", group_key="campaign", split=SplitOptions("key", (0.5, 0.5)), out="b.lmdb")
    report = run("a.extxyz", group_key="other", split=SplitOptions("key", (0.5, 0.5)), out="b.lmdb")
    assert "there is no other" in report.dropped[0].reason


def test_a_report_is_plain_values() -> None:
    frames = trajectory(slab(), 3)
    frames[1].calc.results["energy"] = np.nan
    write("a.traj", frames)
    record = run("a.traj").to_record()
    assert json.loads(json.dumps(record)) == record
    assert record["read"] == 3
    assert record["dropped"] == [{"file": "a.traj", "index": 1, "reason": "the energy is not finite (NaN)"}]


def test_a_selection_chooses_as_ase_s_database_does() -> None:
    database = DATA.parents[2] / "data/own_data/oxides.db"
    for text in ("natoms>5", "Ti>0,O<4", "volume>60,natoms<=6", "Ti"):
        expected = connect(database).count(text)
        assert 0 < expected < 295
        report = run(database, select=FrameSelection(text))
        assert (report.read, report.kept, report.not_selected) == (295, expected, 295 - expected)
        assert report.dropped == []
        Path("out.lmdb").unlink()


def test_a_selection_reads_keys_and_results_of_any_file() -> None:
    frames = trajectory(slab(), 6)
    for number, atoms in enumerate(frames):
        atoms.info["stage"] = number
    frames[1].info["stage"] = "first"
    del frames[2].info["stage"]
    write("run.extxyz", frames)
    energies = sorted(float(atoms.get_potential_energy()) for atoms in frames)
    middle = (energies[2] + energies[3]) / 2
    report = run("run.extxyz", select=FrameSelection(f"energy<{middle}"))
    assert (report.kept, report.not_selected) == (3, 3)
    Path("out.lmdb").unlink()
    report = run("run.extxyz", select=FrameSelection("stage>=4"))
    assert (report.kept, report.not_selected) == (2, 3)
    assert [(item.index, item.reason) for item in report.dropped] == [
        (1, "its stage is 'first', which cannot be compared as in 'stage>=4'")
    ]
    Path("out.lmdb").unlink()
    assert run("run.extxyz", select=FrameSelection("stage")).kept == 5
    assert run("run.extxyz", out="none.lmdb", select=FrameSelection("Xy3zz")).kept == 0
    assert not Path("none.lmdb").exists()


@pytest.mark.parametrize("text", ["", "natoms>", "natoms>many", "formula<Cu", "a>b>c", "Cu>x"])
def test_a_selection_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"the selection .* is not understood"):
        FrameSelection(text)


def gpaw_text(atoms: Atoms, energy: float, forces: np.ndarray) -> str:
    """The layout of GPAW's text output, as far as ASE reads it."""

    def row(values: np.ndarray) -> str:
        return " ".join(f"{value:12.6f}" for value in values)

    symbols = atoms.get_chemical_symbols()
    places = [f"{n:4d} {symbol} {row(atoms.positions[n])}" for n, symbol in enumerate(symbols)]
    axes = [
        f"  {n + 1}. axis:    {'yes' if atoms.pbc[n] else 'no '} {row(atoms.cell[n])}  24  0.2"
        for n in range(3)
    ]
    lines = [
        *("", "  ___ ___ ___ _ _ _  ", " |   |   |_  | | | | ", " | | | | | . | | | | "),
        *(" |__ |  _|___|_____|  24.6.0", " |___|_|             ", ""),
        *("Total charge: 0.000000", "", "Positions:", *places, ""),
        *("Unit cell:", "           periodic     x           y           z      points  spacing", *axes, ""),
        *("Energy contributions relative to reference atoms: (reference = -1000.0)", ""),
        *("Kinetic:        +10.000000", "Potential:      -12.000000", "--------------------------"),
        *(f"Free energy:   {energy - 0.02:+11.6f}", f"Extrapolated:  {energy:+11.6f}", ""),
        *("Forces in eV/Ang:", *(f"{n:4d} {symbols[n]} {row(forces[n])}" for n in range(len(atoms))), ""),
    ]
    return "\n".join(lines) + "\n"


def test_a_text_output_of_gpaw_is_imported() -> None:
    atoms = labelled(slab("Cu"))
    energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
    Path("relax.txt").write_text(gpaw_text(atoms, energy, forces), encoding="utf-8")
    report = run("relax.txt")
    assert (report.kept, report.dropped) == (1, [])
    record = OC20Lmdb("out.lmdb")[0]
    assert record.energy.item() == pytest.approx(energy, abs=1e-5)
    assert np.allclose(record.forces, forces, atol=1e-5)
    assert np.allclose(record.cell[0], atoms.cell, atol=1e-5)
    # ASE reads the energy extrapolated to zero smearing alone.
    report = run("relax.txt", out="free.lmdb", energy="free_energy")
    assert report.kept == 0
    assert "free" in report.dropped[0].reason


def test_different_frames_of_a_long_run_are_no_duplicates() -> None:
    """Tell 5,000 slabs that differ by hundredths of Å apart, and find the one copy."""
    fields = {"cell": slab().cell.array, "atomic_numbers": slab().numbers}
    random, start = np.random.default_rng(0), slab().positions
    frames = [start + random.normal(0.0, 0.002, start.shape) for _ in range(5000)]
    frames.append(frames[123] + 1e-6)
    places = [
        Place("run", FrameFacts.of(number, {**fields, "pos": pos, "pbc": [True] * 3, "energy": 0.0}))
        for number, pos in enumerate(frames)
    ]
    assert [(later.facts.index, first.facts.index) for later, first, _ in duplicates(places)] == [(5000, 123)]

"""Bulks and slabs: every way of naming them, OC20's rules, and input that means nothing."""

import importlib.util
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.constraints import FixAtoms, FixScaled
from ase.db import connect
from ase.io import write

from equiformer2.adsorption.bulks import find_bulk
from equiformer2.adsorption.dft_inputs import Candidate, write_dft_input
from equiformer2.adsorption.named_structures import build_slab
from equiformer2.adsorption.placements import placements
from equiformer2.adsorption.slabs import find_slab, height_tags, parse_miller, sides_differ, slabs_of_bulk
from equiformer2.errors import InputError
from equiformer2.inference.atoms import fixed_mask


@pytest.mark.parametrize(
    ("text", "formula", "volume"),
    [
        ("Cu", "Cu", 3.61**3 / 4),
        ("Cu fcc a=3.7", "Cu", 3.7**3 / 4),
        ("Fe A2 a=2.9", "Fe", 2.9**3 / 2),
        ("Ru hcp a=2.7 c=4.3", "Ru2", 2.7**2 * 4.3 * np.sqrt(3) / 2),
        ("Cu3Pt L1_2 a=3.7", "Cu3Pt", 3.7**3),
        ("PtCu3 l12 a=3.7", "Cu3Pt", 3.7**3),
        ("CuAu L1_0 a=4 c=3.7", "Au2Cu2", 4 * 4 * 3.7),
        ("NiAl B2 a=2.9", "AlNi", 2.9**3),
        ("NiO rocksalt a=4.2", "NiO", 4.2**3 / 4),
        ("CeO2 fluorite a=5.4", "CeO2", 5.4**3 / 4),
    ],
)
def test_bulks_by_formula(text: str, formula: str, volume: float) -> None:
    found = find_bulk(text)
    assert found.atoms.get_chemical_formula() == Atoms(formula).get_chemical_formula()
    assert found.atoms.get_volume() == pytest.approx(volume, rel=1e-6)
    assert found.atoms.pbc.all()


def test_alloys_have_a_lattice_constant_of_their_elements() -> None:
    found = find_bulk("Cu3Pt L1_2")
    assert found.atoms.cell.lengths()[0] == pytest.approx(3.69, abs=0.01)
    assert "from the volumes of its elements" in found.notices[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", "there is no bulk 'foo'"),
        ("", "there is no bulk"),
        ("Xx", "there is no bulk 'Xx'"),
        ("Cu3Pt", "needs its lattice"),
        ("Cu fcc b=3", "'b=3' .* is no lattice constant"),
        ("Cu fcc a=nan", "is no lattice constant"),
        ("Cu fcc bcc a=3", "names two lattices"),
        ("Cu bcc", "give the lattice constant of its bcc crystal"),
        ("Cu foo", "'foo' is no lattice of elements"),
        ("Ga", "Ga is orthorhombic"),
        ("Cu3Pt B2 a=3", "Cu3Pt is no cesiumchloride crystal"),
        ("NiO rocksalt", "give .*a="),
        ("Cu3Pt spinel", "'spinel' is no lattice of compounds"),
        ("Cu fcc a=3.6 c=4", "c=4 has no meaning"),
        ("mp-30", "give the file that holds it with --bulks"),
        (fcc111("Pt", (1, 1, 3), vacuum=10), "without atoms along a lattice vector"),
        (3, "the bulk cannot be made of int"),
    ],
)
def test_bulks_that_are_none(text: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_bulk(text)


def test_bulk_file_and_pymatgen_object(tmp_path: Path) -> None:
    write(tmp_path / "cu.cif", bulk("Cu", cubic=True))
    assert len(find_bulk(str(tmp_path / "cu.cif")).atoms) == 4
    with pytest.raises(OSError, match="missing"):
        find_bulk(str(tmp_path / "missing.cif"))
    core = pytest.importorskip("pymatgen.core")
    structure = core.Structure(core.Lattice.cubic(3.0), ["Ni", "Al"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert find_bulk(structure).atoms.get_chemical_formula() == "AlNi"


def database(path: Path) -> Path:
    with connect(path) as rows:
        rows.write(bulk("Cu"), mpid="mp-30")
        rows.write(bulk("Pt"), mpid="mp-126")
        rows.write(bulk("Cu", a=3.7), mpid="mp-30")
    return path


def plain_json(path: Path) -> Path:
    atoms = bulk("Pt")
    fields = {
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell.tolist(),
    }
    rows = [{"src_id": "mp-126", "atoms": fields}, {"src_id": "mp-1", "atoms": {}}, 7]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("make", "name"), [(database, "b.db"), (database, "b.json"), (plain_json, "plain.json")]
)
def test_bulks_by_number(tmp_path: Path, make: object, name: str) -> None:
    path = make(tmp_path / name)  # type: ignore[operator]
    found = find_bulk("mp-126", path)
    assert found.atoms.get_chemical_symbols() == ["Pt"]
    assert found.atoms.get_volume() == pytest.approx(bulk("Pt").get_volume())
    with pytest.raises(InputError, match="no mp-999"):
        find_bulk("mp-999", path)
    if make is database:
        assert "mp-30 2 times" in find_bulk("mp-30", path).notices[0]
    with pytest.raises(InputError, match="leave out the file of bulks"):
        find_bulk("Cu", path)


def test_files_that_hold_no_bulks(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2")
    (tmp_path / "b.json").write_text("3")
    (tmp_path / "c.json").write_text('[{"src_id": "mp-1"}]')
    sqlite3.connect(tmp_path / "d.db").execute("CREATE TABLE other (id)").connection.commit()
    (tmp_path / "e.db").write_text("no database")
    huge = {"__ndarray__": [[10**12, 3], "float64", [0.0]]}
    (tmp_path / "f.json").write_text(
        json.dumps([{"src_id": "mp-1", "numbers": [1], "positions": huge, "cell": huge}])
    )
    for name in "a.json", "b.json", "c.json", "d.db", "e.db", "f.json":
        with pytest.raises(InputError, match=name):
            find_bulk("mp-1", tmp_path / name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("111", (1, 1, 1)),
        ("1,1,-1", (1, 1, -1)),
        ("1 -1 0", (1, -1, 0)),
        ("11-1", (1, 1, -1)),
        ("(211)", (2, 1, 1)),
        ("222", (1, 1, 1)),
        ("0001", (0, 0, 1)),
        ("1,0,-1,0", (1, 0, 0)),
        ((2, 0, 0), (1, 0, 0)),
        ("10,1,0", (10, 1, 0)),
    ],
)
def test_miller_indices(text: object, expected: tuple[int, int, int]) -> None:
    assert parse_miller(text) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["000", "0,0,0", "1.5,1,1", "11", "1,1", "abc", "", "1111", "11,1,0", "1,1,1,1,1", (1.5, 0, 0), (1, 1)],
)
def test_impossible_miller_indices(text: object) -> None:
    with pytest.raises(InputError, match="Miller"):
        parse_miller(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "miller", "layers_free"),
    [
        ("Cu", "111", 1), ("Cu", "100", 2), ("Cu", "110", 2), ("Cu", "211", 3), ("Fe", "110", 1),
        ("Fe", "111", 3), ("Cu", "3,2,1", None), ("Po sc a=3.35", "100", 1),
    ],
)  # fmt: skip
def test_lattices_are_cut_without_other_packages(name: str, miller: str, layers_free: int | None) -> None:
    (slab,) = slabs_of_bulk(name, miller)
    atoms, report = slab.atoms, slab.report
    found = find_bulk(name)
    assert report.thickness >= 7.0
    assert min(report.lengths) >= 8.0
    assert report.vacuum == pytest.approx(20.0, abs=1e-3)
    nearest = found.atoms.get_all_distances(mic=True)
    distances = atoms.get_all_distances(mic=True)
    np.fill_diagonal(distances, 9.0)
    expected = {"fcc": 1 / np.sqrt(2), "bcc": np.sqrt(3) / 2, "sc": 1.0}[found.crystal]
    assert nearest.shape == (1, 1)
    assert distances.min() == pytest.approx(expected * found.lattice_constant, rel=1e-5)
    # As dense as the bulk: the area of the cell times the spacing of the layers is a volume per atom.
    heights = np.unique(atoms.positions[:, 2].round(3))
    area = np.linalg.norm(np.cross(*atoms.cell.array[:2]))
    per_atom = area * np.diff(heights).mean() / (len(atoms) / len(heights))
    assert per_atom == pytest.approx(found.atoms.get_volume(), rel=1e-3)
    assert np.array_equal(fixed_mask(atoms), atoms.get_tags() == 0)
    if layers_free is not None:
        free = np.unique(atoms.positions[atoms.get_tags() == 1, 2].round(3))
        assert len(free) == layers_free
    assert not report.asymmetric
    assert (report.constraints_from, report.tags_from, report.termination) == (
        "OC20's rule",
        "OC20's rule",
        0,
    )


def test_four_indices_are_of_hexagonal_crystals() -> None:
    for miller in ("0001", (1, 0, -1, 0)):
        with pytest.raises(InputError, match=r"Cu \(fcc\) is none: give three"):
            slabs_of_bulk("Cu", miller)


def test_planes_of_tetragonal_alloys_are_told() -> None:
    assert "close-packed 111 is 101" in find_bulk("FePt L1_0 a=3.85 c=3.71").notices[-1]


def test_all_planes() -> None:
    planes = [slab.report.miller for slab in slabs_of_bulk("Cu", "all", max_miller=2)]
    assert planes == [(1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 0), (2, 1, 1), (2, 2, 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"termination": 1}, "has 1 distinct termination and no number 1: give 0"),
        ({"termination": "top"}, "neither a number nor all"),
        ({"max_miller": 0, "miller": "all"}, "largest Miller index is 0"),
        ({"vacuum": 0}, "the vacuum of the slab is 0"),
        ({"vacuum": 2.0}, r"a vacuum of 2 Å is too thin.*--vacuum"),
        ({"width": 1e9}, "the width of the slab is 1e"),
        ({"miller": "000"}, "are no Miller indices"),
    ],
)
def test_slabs_that_are_not_there(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        slabs_of_bulk("Cu", **{"miller": "111", **settings})


@pytest.mark.skipif(importlib.util.find_spec("pymatgen") is not None, reason="the package is installed")
def test_missing_packages_name_the_extra() -> None:
    with pytest.raises(InputError, match="pip install pymatgen"):
        slabs_of_bulk("Cu3Pt L1_2", "111")


@pytest.mark.parametrize(
    ("text", "miller"),
    [
        ("Ru", (1, 0, 0)), ("NaCl rocksalt a=5.6", (1, 1, 1)), ("CuAu L1_0 a=3.96 c=3.67", (1, 0, 1)),
        ("Cu3Pt L1_2 a=3.7", (1, 1, 0)),
    ],
)  # fmt: skip
def test_slabs_are_those_of_fairchem(text: str, miller: tuple[int, int, int]) -> None:
    pytest.importorskip("fairchem.data.oc")
    from equiformer2.adsorption.open_catalyst import open_catalyst

    core = open_catalyst()
    found = find_bulk(text)
    theirs = core.Slab.from_bulk_get_specific_millers(miller, core.Bulk(bulk_atoms=found.atoms))
    ours = slabs_of_bulk(found, miller, "all")
    assert len(theirs) == len(ours)
    for expected, slab in zip(theirs, ours, strict=True):
        atoms = slab.atoms
        assert atoms.get_chemical_formula() == expected.atoms.get_chemical_formula()
        assert np.array_equal(np.bincount(atoms.get_tags()), np.bincount(expected.atoms.get_tags()))
        assert slab.report.bottom_up is not expected.top
        assert abs(np.linalg.det(atoms.cell)) == pytest.approx(abs(np.linalg.det(expected.atoms.cell)))
        lengths = [np.sort(a.get_all_distances(mic=True).ravel()) for a in (atoms, expected.atoms)]
        assert np.allclose(lengths[0], lengths[1], atol=1e-3)
        top = atoms.positions[atoms.get_tags() == 1, 2]
        assert top.min() > atoms.positions[:, 2].mean()
        assert np.allclose(atoms.cell.array[:2, 2], 0)


def test_terminations() -> None:
    pytest.importorskip("pymatgen.core")
    (first,) = slabs_of_bulk("NaCl rocksalt a=5.6", "111")
    assert "2 terminations and the first is taken" in " ".join(first.report.notices)
    slabs = slabs_of_bulk("CeO2 fluorite a=5.41", "111", "all")
    assert [slab.report.termination for slab in slabs] == [0, 1, 2]
    tops = [slab.atoms.get_chemical_symbols()[int(slab.atoms.positions[:, 2].argmax())] for slab in slabs]
    assert set(tops) == {"Ce", "O"}
    assert sum(slab.report.asymmetric for slab in slabs) == 2
    assert any("dipole" in notice for notice in slabs[0].report.notices)


def test_slab_from_a_file_keeps_its_constraints(tmp_path: Path) -> None:
    slab = fcc111("Cu", (2, 2, 4), vacuum=10, periodic=True)
    slab.set_tags(0)
    slab.set_constraint(FixAtoms([0, 1, 2, 3, 4]))
    write(tmp_path / "slab.traj", slab)
    found = find_slab(str(tmp_path / "slab.traj"))
    assert np.flatnonzero(fixed_mask(found.atoms)).tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(found.atoms.get_tags() == 0, fixed_mask(found.atoms))
    assert (found.report.constraints_from, found.report.tags_from) == ("file", "constraints")
    assert found.report.summary()["vacuum_A"] == pytest.approx(20.0, abs=1e-3)
    json.dumps(found.report.summary())


def test_slab_with_all_atoms_held_has_a_surface() -> None:
    slab = fcc111("Cu", (2, 2, 4), vacuum=10, periodic=True)
    slab.set_tags(0)
    slab.set_constraint(FixAtoms(range(len(slab))))
    found = find_slab(slab)
    assert fixed_mask(found.atoms).all()
    assert np.array_equal(found.atoms.get_tags() == 1, height_tags(slab) == 1)
    assert (found.report.constraints_from, found.report.tags_from) == ("file", "OC20's rule")


def test_a_tilted_slab_is_as_thick_as_an_upright_one() -> None:
    slab = fcc111("Cu", (2, 2, 4), vacuum=10, periodic=True)
    upright = find_slab(slab.copy()).report
    slab.rotate(37.0, (1.0, 2.0, 0.5), rotate_cell=True)
    tilted = find_slab(slab).report
    assert tilted.thickness == pytest.approx(upright.thickness, abs=1e-3)
    assert tilted.asymmetric == upright.asymmetric


def test_lattices_that_dft_codes_refuse_are_completed(tmp_path: Path) -> None:
    right = fcc111("Cu", (2, 2, 3), vacuum=8.0)
    left = right.copy()
    left.set_cell(right.cell.array[[1, 0, 2]])
    left.set_constraint([FixAtoms(range(4)), FixScaled([5], (True, False, False))])
    found = find_slab(left)
    assert np.allclose(found.atoms.cell.array, right.cell.array)
    assert np.allclose(found.atoms.positions, right.positions)
    assert list(found.atoms.constraints[1].mask) == [False, True, False]
    assert any("left-handed" in notice for notice in found.report.notices)
    # ASE's builders give no third vector without a vacuum.
    for bare in (fcc111("Cu", (2, 2, 3)), left[::-1]):
        bare.set_constraint(FixAtoms(mask=bare.positions[:, 2] < bare.positions[:, 2].min() + 0.1))
        bare.cell[2], bare.pbc = 0.0, (True, True, False)
        found = find_slab(bare)
        assert found.report.vacuum is None
        assert not found.atoms.pbc[2]
        assert np.linalg.det(found.atoms.cell.array) > 0.0
        assert found.atoms.cell[2, 2] == pytest.approx(found.report.thickness + 20.0, abs=1e-3)
        assert np.allclose(found.atoms.positions, bare.positions)
        assert any("no third lattice vector" in notice for notice in found.report.notices)
        (top,) = placements(found.atoms, "O", "positions", positions=[(0.0, 0.0)])
        write_dft_input(tmp_path / "dft", Candidate("O", top.atoms, 0.0))
        (tmp_path / "dft" / "POSCAR").unlink()


def test_slab_without_constraints_gets_oc20s(tmp_path: Path) -> None:
    slab = fcc111("Cu", (2, 2, 4), vacuum=10, periodic=True)
    slab.set_tags(0)
    write(tmp_path / "POSCAR", slab)
    found = find_slab(str(tmp_path / "POSCAR"))
    assert found.atoms.get_tags().tolist() == [0] * 12 + [1] * 4
    assert np.array_equal(fixed_mask(found.atoms), found.atoms.get_tags() == 0)
    assert (found.report.constraints_from, found.report.tags_from) == ("OC20's rule", "OC20's rule")
    slab.set_tags([0] * 8 + [1] * 8)  # OC20's tags are believed
    kept = find_slab(slab)
    assert fixed_mask(kept.atoms).sum() == 8
    assert (kept.report.constraints_from, kept.report.tags_from) == ("OC20's rule", "file")


def test_slab_by_name() -> None:
    found = find_slab("Pt111", size=(2, 2, 3))
    assert len(found.atoms) == 12
    assert found.report.miller == (1, 1, 1)
    assert found.report.constraints_from == "name"
    assert find_slab("Ru0001").report.miller == (0, 0, 1)
    wide = find_slab("Pt111", lattice_constant=3.99)
    assert wide.bulk is not None
    assert wide.bulk.lattice_constant == pytest.approx(3.99)


@pytest.mark.parametrize(
    ("slab", "message"),
    [
        (bulk("Pt", cubic=True), "no vacuum"),
        ("Qq111", "is no slab"),
    ],
)
def test_slabs_that_are_none(slab: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_slab(slab)  # type: ignore[arg-type]


def test_a_vacuum_that_is_none_names_its_option() -> None:
    with pytest.raises(InputError, match=r"2 Å on either side leaves 4 Å .* such as --vacuum 10"):
        find_slab("Pt111", size=(2, 2, 3), vacuum=2.0)
    assert find_slab("Pt111", size=(2, 2, 3), vacuum=3.1).report.vacuum == pytest.approx(6.2)


def test_slab_with_an_adsorbate_is_refused() -> None:
    slab = build_slab("Pt111", (2, 2, 3))
    slab.extend(Atoms("O", [[0, 0, slab.positions[:, 2].max() + 1.5]], tags=[2]))
    with pytest.raises(InputError, match="already has adsorbate atoms"):
        find_slab(slab)


def test_height_tags_and_sides() -> None:
    slab = build_slab("Cu100", (1, 1, 4))
    assert height_tags(slab).tolist() == [0, 0, 1, 1]
    assert not sides_differ(slab)
    slab.numbers[-1] = 78
    assert sides_differ(slab)

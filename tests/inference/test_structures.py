"""Slabs and adsorbates by name, their orientation and contact, and start structures from files."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111, molecule
from ase.data import covalent_radii
from ase.io import write

from datasets_oc20.errors import DataError
from datasets_oc20.structure_files import read_structure
from equiformer2.adsorption import PlacementOptions, SlabOptions, load_system, prepare_system
from equiformer2.adsorption.named_structures import build_adsorbate, build_slab, place_adsorbate
from equiformer2.errors import InputError
from equiformer2.inference.atoms import fixed_mask


@pytest.mark.parametrize("name", ["Pt111", "Cu100", "Ni110", "Fe110", "W100", "Ru0001", "Pt(111)"])
def test_slab_tags_and_constraints(name: str) -> None:
    slab = build_slab(name, (2, 2, 4))
    assert len(slab) == 16
    assert slab.pbc.all()
    assert np.array_equal(fixed_mask(slab), slab.get_tags() == 0)
    assert sorted(slab.get_tags()) == [0] * 8 + [1] * 8
    assert slab.positions[slab.get_tags() == 1, 2].min() > slab.positions[slab.get_tags() == 0, 2].max()
    assert slab.cell[2, 2] - np.ptp(slab.positions[:, 2]) == pytest.approx(20.0)


def test_slab_options() -> None:
    slab = build_slab("Pt111", (1, 1, 3), vacuum=6.0, free_layers=3, lattice_constant=4.0)
    assert not slab.constraints
    assert slab.cell[0, 0] == pytest.approx(4.0 / np.sqrt(2))
    assert slab.cell[2, 2] - np.ptp(slab.positions[:, 2]) == pytest.approx(12.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Pt0001", {}, "Pt is fcc: 0001 is not one of its slabs 111, 100, 110"),
        ("Qq111", {}, "'Qq111' is no slab"),
        ("platinum", {}, "'platinum' is no slab"),
        ("Si111", {}, "Si is diamond"),
        ("Pt111", {"size": (0, 1, 1)}, "slab size"),
        ("Pt111", {"lattice_constant": float("nan")}, "must be positive"),
        ("Pt111", {"vacuum": float("inf")}, "must be positive"),
        ("Pt111", {"free_layers": 5}, "free_layers is 5: give 1 to 4"),
        ("Pt111", {"vacuum": -1.0}, "must be positive"),
    ],
)
def test_wrong_slabs(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_slab(name, **options)


@pytest.mark.parametrize(
    ("name", "formula", "binding"),
    [
        ("H", "H", "H"),
        ("*O", "O", "O"),
        ("CO", "CO", "C"),
        ("*OH", "HO", "O"),
        ("*OH2", "H2O", "O"),
        ("H2O", "H2O", "O"),
        ("NH3", "H3N", "N"),
        ("N2", "N2", "N"),
        ("H2", "H2", "H"),
        ("CH3", "CH3", "C"),
        ("*OCH3", "CH3O", "O"),
        ("*CHO", "CHO", "C"),
        ("CH2", "CH2", "C"),
    ],
)
def test_adsorbates_point_up(name: str, formula: str, binding: str) -> None:
    adsorbate, atom = build_adsorbate(name)
    assert adsorbate.get_chemical_formula() == formula
    assert adsorbate.get_chemical_symbols()[atom] == binding
    height = adsorbate.positions[:, 2] - adsorbate.positions[atom, 2]
    others = np.delete(height, atom)
    if len(others):
        assert others.mean() > -1e-6
    if len(adsorbate) == 2:
        assert np.delete(adsorbate.positions - adsorbate.positions[atom], atom, axis=0)[
            0, :2
        ] == pytest.approx([0, 0], abs=1e-6)


def test_orientation_keeps_the_molecule() -> None:
    for name in ("CH3CH2OH", "CO2", "C6H6", "*OCH3"):
        for flat in (False, True):
            adsorbate, _ = build_adsorbate(name, flat=flat)
            original = molecule(name if "*" not in name else "CH3O")
            assert np.allclose(adsorbate.get_all_distances(), original.get_all_distances())


def test_evenly_surrounded_and_flat_adsorbates_lie_flat() -> None:
    for name, flat in (("CO2", False), ("CH3", False), ("C6H6", True)):
        assert np.ptp(build_adsorbate(name, flat=flat)[0].positions[:, 2]) == pytest.approx(0, abs=1e-3)


def test_binding_atom_is_chosen() -> None:
    adsorbate, atom = build_adsorbate("CO", binding_atom=0)
    assert adsorbate.get_chemical_symbols()[atom] == "O"
    assert adsorbate.positions[1, 2] > adsorbate.positions[0, 2]
    with pytest.raises(
        InputError, match=r"binding atom 2 does not exist in CO: it has atoms 0 to 1 \(O, C\)"
    ):
        build_adsorbate("CO", binding_atom=2)


def test_unknown_adsorbate_names_near_ones() -> None:
    with pytest.raises(InputError, match=r"'CH3OHH' is no molecule ASE knows.*CH3OH"):
        build_adsorbate("CH3OHH")


@pytest.mark.parametrize("site", ["ontop", "bridge", "fcc", "hcp"])
def test_sites(site: str) -> None:
    slab = build_slab("Pt111", (3, 3, 4))
    system = place_adsorbate(slab, Atoms("O"), site=site)
    assert system.get_tags().tolist() == [*slab.get_tags(), 2]
    assert np.array_equal(fixed_mask(system)[:-1], fixed_mask(slab))
    nearest = np.sort(system.get_distances(len(slab), range(len(slab)), mic=True))
    bond = covalent_radii[8] + covalent_radii[78]
    expected = {"ontop": 1, "bridge": 2, "fcc": 3, "hcp": 3}[site]
    assert nearest[:expected] == pytest.approx(bond)
    assert nearest[expected] > bond + 0.1
    heights = np.unique(np.round(slab.positions[:, 2], 3))
    straight_below = np.linalg.norm((slab.positions - system.positions[-1])[:, :2], axis=1) < 1e-6
    layers_below = set(np.searchsorted(heights, np.round(slab.positions[straight_below, 2], 3)))
    assert layers_below == {"ontop": {3, 0}, "bridge": set(), "fcc": {1}, "hcp": {2}}[site]
    middle = slab.cell.array[:2, :2].sum(axis=0) / 2
    assert np.linalg.norm(system.positions[-1, :2] - middle) < 2.8  # not at the corner


def test_height_and_position() -> None:
    slab = build_slab("Cu100", (2, 2, 3))
    carbon_down, atom = build_adsorbate("CO")
    system = place_adsorbate(slab, carbon_down, atom, position=(1.0, 2.0), height=1.7)
    assert system.positions[len(slab) + atom] == pytest.approx([1.0, 2.0, slab.positions[:, 2].max() + 1.7])


def test_a_flat_molecule_does_not_touch() -> None:
    slab = build_slab("Cu111", (4, 4, 3))
    benzene, atom = build_adsorbate("C6H6", flat=True)
    system = place_adsorbate(slab, benzene, atom)
    radii = covalent_radii[system.numbers]
    gaps = system.get_all_distances(mic=True) - radii[:, None] - radii[None, :]
    assert gaps[: len(slab), len(slab) :].min() == pytest.approx(0, abs=1e-6)


class TestPrepare:
    def test_by_name(self) -> None:
        system = prepare_system("Pt111", "CO", SlabOptions(size=(2, 2, 3)), PlacementOptions(site="hcp"))
        assert system.get_chemical_formula() == "COPt12"

    def test_from_files(self, tmp_path: Path) -> None:
        slab = build_slab("Pt111", (2, 2, 3))
        slab.write(tmp_path / "slab.traj")
        lying = Atoms("OC", [[0, 0, 0], [1.1, 0, 0]])
        lying.write(tmp_path / "adsorbate.xyz")
        system = prepare_system(str(tmp_path / "slab.traj"), str(tmp_path / "adsorbate.xyz"))
        assert system.get_tags().tolist() == [*slab.get_tags(), 2, 2]
        assert fixed_mask(system).sum() == 4
        assert system.positions[-1, 2] == pytest.approx(system.positions[-2, 2])
        top = slab.positions[slab.positions[:, 2] > slab.positions[:, 2].max() - 0.1, :2]
        assert np.linalg.norm(top - system.positions[-2, :2], axis=1).min() < 1e-6

    @pytest.mark.parametrize(
        ("slab", "adsorbate", "slab_options", "placement", "message"),
        [
            ("slab.traj", "CO", SlabOptions(size=(2, 2, 2)), PlacementOptions(), "size only apply"),
            ("slab.traj", "CO", None, PlacementOptions(site="fcc"), "position x y"),
            ("system.traj", "CO", None, None, "already has adsorbate"),
            ("no_plane.traj", "CO", None, None, "lie in one plane"),
            ("Pt111", "co.xyz", None, PlacementOptions(flat=True), "leave out flat"),
            ("Pt111", "co.xyz", None, PlacementOptions(binding_atom=5), "binding atom 5"),
            ("Pt111", "CO", None, PlacementOptions(site="hollow"), "ontop, bridge, fcc, hcp"),
            ("Pt111", "CO", None, PlacementOptions(site="fcc", position=(0, 0)), "one of them"),
            ("Pt111", "O", None, PlacementOptions(height=0.01), "closer than a bond"),
            ("Pt111", "O", None, PlacementOptions(height=0.0), "height is 0.0: give a positive number of Å"),
            ("text.xyz", "CO", None, None, "no structure could be read"),
        ],
    )
    def test_wrong_input(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        slab: str,
        adsorbate: str,
        slab_options: SlabOptions | None,
        placement: PlacementOptions | None,
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        clean = build_slab("Pt111", (2, 2, 3))
        write("slab.traj", clean)
        write("system.traj", place_adsorbate(clean, Atoms("O")))
        no_plane = clean.copy()
        no_plane.cell[1] = 2 * no_plane.cell[0]
        write("no_plane.traj", no_plane)
        write("co.xyz", molecule("CO"))
        Path("text.xyz").write_text("no structure\n")
        with pytest.raises(InputError, match=message):
            prepare_system(slab, adsorbate, slab_options, placement)


class TestLoad:
    def test_indices_mark_the_adsorbate(self, tmp_path: Path, oxygen_on_copper: Atoms) -> None:
        path = tmp_path / "system.extxyz"
        oxygen_on_copper.set_tags(0)
        oxygen_on_copper.info = {}
        oxygen_on_copper.write(path)
        assert load_system(str(path), [12]).get_tags().tolist() == [0] * 8 + [1] * 4 + [2]
        for wrong in ([13], [-1], []):
            with pytest.raises(InputError, match="numbers from 0 to 12"):
                load_system(str(path), wrong)

    def test_missing_file_folder_and_frame(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_structure(tmp_path / "missing.traj")
        with pytest.raises(DataError, match="is a folder"):
            read_structure(tmp_path)
        fcc111("Pt", (1, 1, 1), vacuum=5).write(tmp_path / "one.traj")
        with pytest.raises(DataError, match=r"one\.traj: no structure could be read at index 3"):
            read_structure(tmp_path / "one.traj", 3)

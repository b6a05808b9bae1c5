"""Placements: every mode, the same for a seed whatever the number, and starts that cannot be used."""

import contextlib
import importlib.util
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.constraints import FixAtoms
from ase.data import covalent_radii
from ase.geometry import get_distances

from equiformer2.adsorption.named_structures import build_slab, place_adsorbate
from equiformer2.adsorption.open_catalyst import open_catalyst
from equiformer2.adsorption.placements import MODES, OC20_MODE, coverage_placements, placements
from equiformer2.adsorption.start_checks import check_start
from equiformer2.errors import InputError
from equiformer2.inference.atoms import fixed_mask
from tests.observed import observed

SLAB = build_slab("Pt111", (3, 3, 4))


def arguments(mode: str) -> dict:
    if mode == OC20_MODE:
        pytest.importorskip("fairchem.data.oc")
        pytest.importorskip("pymatgen.core")
    return {"mode": mode, "positions": [(1.0, 1.0), (4.0, 3.0)] if mode == "positions" else None}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["*CH2*O", "*OH"])
def test_modes(mode: str, name: str) -> None:
    found = placements(SLAB, name, number=6, seed=1, **arguments(mode))
    assert len(found) == 6
    assert len({placement.id for placement in found}) == 6
    for placement in found:
        atoms = placement.atoms
        assert placement.mode == mode
        assert np.array_equal(atoms.get_tags()[: len(SLAB)], SLAB.get_tags())
        assert (atoms.get_tags()[len(SLAB) :] == 2).all()
        assert np.allclose(atoms.positions[: len(SLAB)], SLAB.positions)
        assert np.array_equal(np.flatnonzero(fixed_mask(atoms)), np.flatnonzero(fixed_mask(SLAB)))
        assert not check_start(atoms, cutoff=12.0, closest=1.0)
        assert atoms.positions[len(SLAB) :, 2].min() > SLAB.positions[:, 2].max()


@pytest.mark.parametrize("mode", MODES)
def test_earlier_placements_stay(mode: str) -> None:
    few, many, other = (
        placements(SLAB, "*CHO", number=number, seed=seed, **arguments(mode))
        for number, seed in ((3, 5), (7, 5), (3, 6))
    )
    for first, second in zip(few, many, strict=False):
        assert first.id == second.id
        assert np.array_equal(first.atoms.positions, second.atoms.positions)
    if mode != "positions":
        assert any(
            not np.allclose(a.atoms.positions, b.atoms.positions) for a, b in zip(few, other, strict=True)
        )


@pytest.mark.parametrize(
    ("mode", "index", "expected"),
    [
        ("random", 2, [[2.677039, 0.559923, 15.615824], [2.569467, 1.181488, 14.873607]]),
        ("heuristic", 4, [[1.276328, 2.552655, 15.252373], [1.370378, 3.472978, 15.557268]]),
    ],
)
def test_placements_are_the_same_on_every_machine(mode: str, index: int, expected: list) -> None:
    found = placements(build_slab("Cu100", (2, 2, 3)), "*OH", mode, index + 1, 7)
    assert np.allclose(found[index].atoms.positions[-2:], expected, atol=1e-5)


def test_global_random_numbers_are_left_alone() -> None:
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    placements(SLAB, "*OH", number=2, **arguments(OC20_MODE))
    assert np.random.random() == expected


def test_the_stand_in_for_fairchem_core_does_not_stay() -> None:
    before = {name for name in sys.modules if name.startswith("fairchem.core")}
    with contextlib.suppress(InputError):  # where fairchem-data-oc is not installed
        open_catalyst()
    assert {name for name in sys.modules if name.startswith("fairchem.core")} == before


@pytest.mark.skipif(importlib.util.find_spec("pymatgen") is not None, reason="the package is installed")
def test_missing_package_names_the_extra() -> None:
    with pytest.raises(InputError, match="pip install pymatgen"):
        placements(SLAB, "*CO", OC20_MODE, 2)


def test_heuristic_sites_take_turns_and_adsorbates_stand() -> None:
    found = placements(SLAB, "*CO", number=6)
    assert [placement.site.kind for placement in found] == ["top", "bridge", "hollow"] * 2
    for placement in found:
        carbon, oxygen = placement.atoms.positions[-2:]
        axis = (oxygen - carbon) / np.linalg.norm(oxygen - carbon)
        assert axis[2] > np.cos(np.pi / 9) - 1e-6
        assert np.allclose(carbon[:2], placement.site.position[:2])


def test_symmetry_gives_one_of_each_site() -> None:
    found = placements(SLAB, "*O", "symmetry")
    assert sorted(placement.site.kind for placement in found) == ["bridge", "hollow", "hollow", "top"]
    assert len(placements(SLAB, "*O", "symmetry", 40)) == 4  # an atom more would be a copy
    assert len(placements(SLAB, "*OH", "symmetry", 9)) == 9


def test_random_orientations_are_uniform() -> None:
    found = placements(SLAB, "*CO", "random", 60, 2)
    axes = np.array([p.atoms.positions[-1] - p.atoms.positions[-2] for p in found])
    axes /= np.linalg.norm(axes, axis=1)[:, None]
    assert np.abs(axes.mean(axis=0)).max() < 0.25
    assert axes[:, 2].min() < -0.7
    assert axes[:, 2].max() > 0.7
    fractions = np.linalg.solve(SLAB.cell.array[:2, :2].T, np.array([p.site.position[:2] for p in found]).T)
    assert np.abs(fractions.mean(axis=1) - 0.5).max() < 0.15


def test_rotation_leads_from_the_adsorbate_to_the_placement() -> None:
    from scipy.spatial.transform import Rotation

    from equiformer2.adsorption.adsorbates import find_adsorbate

    original, _ = find_adsorbate("*CHO")
    modes = ["heuristic", "random", "symmetry"]
    for mode in modes:
        for placement in placements(SLAB, "*CHO", mode, 4, 3):
            turned = Rotation.from_rotvec(np.radians(placement.rotation)).apply(original.positions)
            placed = placement.atoms.positions[-len(original) :]
            assert np.allclose(turned - turned[0], placed - placed[0], atol=1e-6)


def test_rotation_of_oc20_mode() -> None:
    from scipy.spatial.transform import Rotation

    from equiformer2.adsorption.adsorbates import find_adsorbate

    original, _ = find_adsorbate("*CHO")
    for placement in placements(SLAB, "*CHO", number=2, **arguments(OC20_MODE)):
        turned = Rotation.from_rotvec(np.radians(placement.rotation)).apply(original.positions)
        placed = placement.atoms.positions[-len(original) :]
        assert np.allclose(turned - turned[0], placed - placed[0], atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_slab_that_hangs_upside_down(mode: str) -> None:
    hanging = SLAB.copy()
    hanging.set_constraint()
    hanging.positions[:, 2] = hanging.cell[2, 2] - hanging.positions[:, 2]
    hanging.set_constraint(FixAtoms(mask=hanging.get_tags() == 0))
    for placement in placements(hanging, "*OH", number=3, **arguments(mode)):
        atoms = placement.atoms
        assert np.allclose(atoms.cell, hanging.cell)
        assert atoms.positions[len(SLAB) :, 2].max() < hanging.positions[:, 2].min()
        assert not check_start(atoms, closest=1.0)


def test_constraints_and_atoms_of_a_file_stay_as_they_are() -> None:
    slab = fcc111("Cu", (2, 2, 4), vacuum=10)
    slab.pbc = True
    slab.set_constraint(FixAtoms([0, 1, 2]))
    slab.set_tags(0)
    slab.wrap()
    found = placements(slab, molecule("H2O"), number=2)
    for placement in found:
        assert np.flatnonzero(fixed_mask(placement.atoms)).tolist() == [0, 1, 2]
        assert placement.atoms.get_tags()[:4].tolist() == [0, 0, 0, 1]


def test_bad_starts_are_left_out_with_their_reasons() -> None:
    small = build_slab("Pt111", (1, 1, 3))
    with pytest.raises(InputError, match=r"larger than the surface|own periodic image"):
        placements(small, "*OCH2CH3", number=3)
    narrow = build_slab("Pt111", (2, 1, 3))
    found = placements(narrow, "*CHO", "random", 5, 1)
    assert len(found) == 5
    assert found.left_out
    assert sum(found.reasons().values()) == len(found.left_out)
    assert all(faults for _, faults in found.left_out)


@pytest.mark.parametrize(
    ("size", "vacuum", "adsorbate", "message"),
    [
        ((2, 2, 3), 10.0, "C60", "larger than the surface: its atom C is .* give a wider slab .--size"),
        ((4, 4, 3), 3.2, "tall", r"is [89]\.\d Å tall, and the vacuum of the slab is 6\.4 Å: .*--vacuum"),
    ],
)
def test_what_fits_nowhere_is_refused_before_a_site_is_tried(
    size: tuple[int, int, int],
    vacuum: float,
    adsorbate: str,
    message: str,
) -> None:
    chain = Atoms("C8", [[0, 0, 1.32 * number] for number in range(8)])
    slab = build_slab("Pt111", size, vacuum=vacuum)
    with observed(place_adsorbate) as tried:
        for mode in ("symmetry", "heuristic", OC20_MODE):
            with pytest.raises(InputError, match=message):
                placements(slab, chain if adsorbate == "tall" else molecule(adsorbate), mode, number=40)
    assert not tried


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "everywhere"}, "mode 'everywhere' is unknown: use one of heuristic"),
        ({"mode": "random"}, "give the number of placements"),
        ({"number": 0}, "number of placements is 0"),
        ({"number": 2.5}, "number of placements is 2.5: give a whole number"),
        ({"mode": "positions"}, "positions and the mode positions go together"),
        ({"positions": [(1, 2)]}, "positions and the mode positions go together"),
        ({"mode": "positions", "positions": [(1, np.nan)]}, "must be two numbers x and y"),
        ({"mode": "positions", "positions": [(1, 2, 3)]}, "must be two numbers"),
        ({"mode": "positions", "positions": [1, 2]}, "must be two numbers"),
        ({"mode": "positions", "positions": [("a", 2)]}, "must be two numbers"),
        ({"mode": "positions", "positions": [(1e9, 2)]}, "of at most 10000"),
        (
            {"mode": "positions", "positions": [(1, 2), (0, 0)], "number": 1},
            "2 positions and only 1 placements",
        ),
        ({"height": 2.0}, "a height has no meaning with the mode heuristic"),
        ({"mode": "positions", "positions": [(1, 2)], "height": -1.0}, "height is -1"),
        ({"mode": "positions", "positions": [(0, 0)], "height": 0.5}, "closer than a bond"),
        ({"seed": -1}, "seed is -1"),
        ({"cutoff": 21.0}, "vacuum of 20.0 Å is thinner than the cutoff of 21 Å"),
        ({"adsorbate": "*XY"}, "no adsorbate of OC20"),
        ({"adsorbate": (molecule("CO"), [2])}, "binding atom 2 does not exist"),
        ({"adsorbate": (molecule("CO"), [])}, "no binding atom"),
        ({"adsorbate": Atoms("CO", [[0, 0, 0], [0, 0, 5]])}, "not one molecule"),
        ({"slab": bulk("Pt", cubic=True)}, "no vacuum"),
        ({"slab": placements(SLAB, "*O", number=1)[0].atoms}, "adsorbate atoms"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    settings = {"slab": SLAB, "adsorbate": "*CO", **changes}
    with pytest.raises(InputError, match=message):
        placements(settings.pop("slab"), settings.pop("adsorbate"), **settings)


def test_coverage() -> None:
    slab = build_slab("Pt111", (4, 4, 3))
    found = coverage_placements(slab, ["*CO", "*CO", "*OH", "*O"], 3, 1, min_distance=3.0)
    again = coverage_placements(slab, ["*CO", "*CO", "*OH", "*O"], 1, 1, min_distance=3.0)
    assert np.array_equal(found[0].atoms.positions, again[0].atoms.positions)
    for placement in found:
        assert [len(group) for group in placement.molecules] == [2, 2, 2, 1]
        atoms = placement.atoms
        for first in placement.molecules:
            for second in placement.molecules:
                if first != second:
                    _, distance = get_distances(
                        atoms.positions[list(first)], atoms.positions[list(second)], cell=atoms.cell, pbc=True
                    )
                    assert distance.min() >= 3.0
    with pytest.raises(InputError, match="of 9 has no site 4 Å from the others"):
        coverage_placements(SLAB, ["*CO"] * 9, 1, min_distance=4.0)
    with pytest.raises(InputError, match=r"adsorbate atoms \(tag 2\) already: give the clean slab"):
        coverage_placements(found[0].atoms, ["*CO"], 1)


def test_subsurface_atoms_that_lie_open_are_told(caplog: pytest.LogCaptureFixture) -> None:
    placements(build_slab("Fe111", (2, 2, 6), free_layers=3), "*O")
    placements(SLAB, "*O")
    assert "lie open" not in caplog.text
    placements(build_slab("Fe111", (2, 2, 6)), "*O")
    assert "4 atoms of tag 0 lie open on the surface" in caplog.text


def test_an_adsorbate_meets_its_image_in_a_skewed_cell() -> None:
    slab = build_slab("Cu111", (1, 1, 3))
    slab.info = {}
    slab.set_cell(slab.cell.array + np.outer([0, 3, 0], slab.cell.array[0]))
    ethane = molecule("C2H6")
    ethane.rotate(90, "y")
    ethane.rotate(90, "z")
    with pytest.raises(InputError, match="meets its own periodic image"):
        place_adsorbate(slab, ethane)


def test_starts_keep_oc20s_distance() -> None:
    for placement in placements(SLAB, "*NH3", number=10, seed=4):
        atoms = placement.atoms
        own = list(placement.molecules[0])
        _, distance = get_distances(
            atoms.positions[own], atoms.positions[: len(SLAB)], cell=atoms.cell, pbc=True
        )
        radii = covalent_radii[atoms.numbers]
        beyond = distance - radii[own][:, None] - radii[: len(SLAB)]
        assert beyond.min() == pytest.approx(0.1, abs=1e-6)

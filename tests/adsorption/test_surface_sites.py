"""Sites of surfaces and their symmetry."""

from collections import Counter

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc211

from equiformer2.adsorption.named_structures import build_slab, free_side_up
from equiformer2.adsorption.placements import placements
from equiformer2.adsorption.surface_sites import equal_sites, open_atoms, surface_sites
from equiformer2.adsorption.symmetry import surface_symmetry


@pytest.mark.parametrize(
    ("name", "tops", "bridges", "hollows", "distinct", "operations"),
    [
        ("Pt111", 4, 12, {3: 8}, 4, 24),
        ("Cu100", 4, 8, {4: 4}, 3, 32),
        ("Fe110", 4, 12, {3: 8}, 4, 16),
        ("W100", 4, 8, {4: 4}, 3, 32),
        ("Ru0001", 4, 12, {3: 8}, 4, 24),
        ("Ni110", 8, 24, {3: 16}, 7, 16),
    ],
)
def test_sites(
    name: str, tops: int, bridges: int, hollows: dict[int, int], distinct: int, operations: int
) -> None:
    slab = free_side_up(build_slab(name, (2, 2, 4)))[0].atoms
    sites = surface_sites(slab)
    kinds = Counter(site.kind for site in sites)
    assert (kinds["top"], kinds["bridge"], kinds["hollow"]) == (tops, bridges, sum(hollows.values()))
    assert Counter(site.coordination for site in sites if site.kind == "hollow") == hollows
    assert len(equal_sites(slab, sites)) == distinct
    assert len(surface_symmetry(slab)) == operations


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.7, -3.1)])
def test_sites_do_not_depend_on_rounding_or_the_origin(shift: tuple[float, float]) -> None:
    slab = build_slab("Cu100", (2, 3, 3))
    expected = Counter((site.kind, site.coordination) for site in surface_sites(slab))
    for seed in range(3):
        moved = slab.copy()
        moved.positions[:, :2] += shift
        moved.wrap()
        moved.set_constraint()
        moved.rattle(1e-4, seed=seed)
        assert Counter((site.kind, site.coordination) for site in surface_sites(moved)) == expected


def test_open_atoms_of_a_step() -> None:
    slab = fcc211("Pt", (3, 1, 4), vacuum=10)
    slab.pbc = True
    heights = slab.positions[open_atoms(slab), 2]
    assert len(heights) == 3
    assert len(np.unique(heights.round(2))) == 3


def test_operations_carry_the_slab_onto_itself() -> None:
    slab = build_slab("Ni110", (2, 2, 3))
    inverse = np.linalg.inv(slab.cell.array)
    for image in surface_symmetry(slab).images(slab.positions):
        between = (image[:, None] - slab.positions[None]) @ inverse
        near = np.abs(between - np.round(between)).max(axis=-1) < 1e-6
        assert near.any(axis=1).all()


def test_a_foreign_atom_breaks_the_symmetry() -> None:
    slab = build_slab("Pt111", (2, 2, 3))
    slab.numbers[int(slab.positions[:, 2].argmax())] = 46
    sites = surface_sites(slab)
    assert len(surface_symmetry(slab)) == 6
    assert len(equal_sites(slab, sites)) > 4


def test_handed_adsorbates_tell_mirrored_sites_apart() -> None:
    slab = free_side_up(fcc211("Cu", (3, 2, 3), vacuum=8.0))[0].atoms
    sites = surface_sites(slab)
    assert len(equal_sites(slab, sites, mirrors=False)) > len(equal_sites(slab, sites))
    straight = Atoms("OH2", [(0.0, 0.0, 0.0), (0.75, 0.0, 0.6), (-0.75, 0.0, 0.6)])
    # The plane of the molecule leans, so that no turn about the normal gives its mirror image.
    handed = Atoms("OHF", [(0.0, 0.0, 0.0), (0.95, 0.0, 0.1), (-0.3, 1.1, 0.8)])
    for molecule, mirrors in ((straight, True), (handed, False)):
        found = placements(slab, (molecule, [0]), "symmetry")
        assert len(found) + len(found.left_out) == len(equal_sites(slab, sites, mirrors))


@pytest.mark.parametrize(("name", "skew"), [("Cu111", 6), ("Cu100", -6), ("Cu110", 3)])
def test_sites_do_not_depend_on_the_choice_of_lattice_vectors(name: str, skew: int) -> None:
    slab = build_slab(name, (1, 1, 5))
    before = surface_sites(slab)
    slab.set_cell(slab.cell.array + np.outer([0, skew, 0], slab.cell.array[0]))
    found = surface_sites(slab)
    assert Counter((one.kind, one.coordination) for one in found) == Counter(
        (one.kind, one.coordination) for one in before
    )
    assert len(equal_sites(slab, found)) == len(equal_sites(slab, before))

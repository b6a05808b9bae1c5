"""Paths between minima: ASE's own barrier, few calls, and ends that are refused."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.geometry import find_mic
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from test_basins import slab, with_adsorbate

from equiformer2.adsorption.neb import EnergyPath, find_path, nearest_copy
from equiformer2.errors import InputError


@pytest.fixture(scope="module")
def ends() -> list[Atoms]:
    found = []
    for site in ("fcc", "hcp"):
        atoms = with_adsorbate(slab(size=(2, 2, 3)), "O", site)
        atoms.calc = EMT()
        BFGS(atoms, logfile=None).run(fmax=0.01)
        found.append(atoms)
    return found


def test_the_barrier_is_that_of_ase(ends: list[Atoms]) -> None:
    path = find_path(*ends, EMT(), images=3, fmax=0.02)
    images = [ends[0], *(ends[0].copy() for _ in range(3)), ends[1]]
    for image in images[1:-1]:
        image.calc = EMT()
    band = NEB(images, climb=True, method="improvedtangent", k=1.0)
    band.interpolate("idpp", mic=True)
    FIRE(band, logfile=None).run(fmax=0.02, steps=300)
    energies = [image.get_potential_energy() for image in images]
    assert path.converged
    assert path.barrier == pytest.approx(max(energies) - energies[0], abs=1e-3)
    assert path.reverse_barrier == pytest.approx(max(energies) - energies[-1], abs=1e-3)
    assert path.summary()["highest_image"] == 2
    # One calculation of every image per step, and the ends.
    assert path.model_evaluations <= 3 * (path.steps + 2) + 2


@pytest.mark.parametrize(
    ("energies", "minima", "barrier", "back"),
    [
        ([0.0, 0.4, 0.1], [], 0.4, 0.3),
        ([0.0, -0.3, -0.6, -0.2, 0.0], [2], 0.6, 0.6),
        ([0.0, -0.5, -0.2], [1], 0.3, 0.5),
        ([0.0, 0.2, 0.5, 0.3], [], 0.5, 0.2),
        ([0.0, 0.3, 0.1, 0.6, 0.4, 0.9, 0.2], [2, 4], 0.9, 0.7),
        ([0.0, 0.2, -0.8, 0.1, -0.5], [2], 0.9, 1.0),
        ([0.0, -0.005, 0.3, 0.1], [], 0.3, 0.2),
        ([0.0, -0.2, -0.4], [], 0.0, 0.4),
    ],
)
def test_the_barrier_begins_at_the_lowest_minimum_before_it(
    energies: list[float], minima: list[int], barrier: float, back: float
) -> None:
    path = EnergyPath([], np.array(energies), True, 0.01, 5, 20)
    record = path.summary()
    found = [(one["image"], one["energy_eV"]) for one in record["intermediate_minima"]]
    assert found == [(image, energies[image]) for image in minima]
    assert record["barrier_eV"] == pytest.approx(barrier)
    assert record["reverse_barrier_eV"] == pytest.approx(back)
    climbs = barrier > 0.0 and back > 0.0
    assert len(record["warnings"]) == bool(minima or not climbs)
    assert any("no barrier" in one for one in record["warnings"]) == (not climbs)


def test_the_band_stays_in_its_steps(ends: list[Atoms]) -> None:
    path = find_path(*ends, EMT(), images=3, fmax=1e-4, steps=2)
    assert (path.steps, path.converged) == (2, False)
    assert path.max_force > 1e-4


def test_the_end_is_the_copy_nearest_to_the_start() -> None:
    clean = slab(size=(3, 3, 3))
    first, last = (with_adsorbate(clean, "CO", "fcc"), with_adsorbate(clean, "CO", "hcp", (1, 1), turn=20.0))
    first.positions[-1] += (0.5, 0.1, -0.2)  # tilted, and a relaxed slab
    last.positions[-1] += (0.1, -0.4, 0.0)
    last.positions[9:27] += np.random.default_rng(0).normal(0.0, 0.05, (18, 3))
    found = nearest_copy(first, last, clean)
    energies = []
    for atoms in (last, found):
        atoms.calc = EMT()
        energies.append(atoms.get_potential_energy())
    assert energies[1] == pytest.approx(energies[0], abs=1e-6)

    def moved(atoms: Atoms, part: slice) -> float:
        vectors = atoms.positions[part] - first.positions[part]
        return float(find_mic(vectors, atoms.cell, atoms.pbc)[1].max())

    assert moved(last, slice(27, None)) > 2.5
    assert moved(found, slice(27, None)) < 2.2
    assert moved(found, slice(0, 9)) < 1e-3  # held atoms are in the start's places
    assert moved(found, slice(0, 27)) < 0.3
    assert np.abs(found.positions - first.positions).max() < 2.5  # no atom is across the cell
    # A copy in the start's place is no end; the nearest other one is.
    first = with_adsorbate(clean, "CO", "fcc")
    copy = nearest_copy(first, with_adsorbate(clean, "CO", "fcc", (2, 1)), clean)
    assert moved(copy, slice(27, None)) == pytest.approx(2.55, abs=0.02)
    same = nearest_copy(first, first, clean)
    assert np.array_equal(same.positions, first.positions)


def test_equal_atoms_of_a_molecule_change_places_rather_than_turn_it() -> None:
    clean = slab(size=(2, 2, 3))
    clean.positions[4:] += np.random.default_rng(0).normal(0.0, 0.02, (8, 3))  # it has no symmetry left
    first = with_adsorbate(clean, "H2O", "ontop", turn=20.0)
    last = first.copy()
    last.positions[12:] += (0.6, 0.3, 0.0)
    last.positions[[13, 14]] = last.positions[[14, 13]]
    moved = nearest_copy(first, last, clean).positions[12:] - first.positions[12:]
    assert np.abs(moved - (0.6, 0.3, 0.0)).max() < 1e-6
    # The hydrogen of the hydroxyl group stays its hydrogen.
    first = with_adsorbate(clean, "CH3OH", "ontop")
    last = first.copy()
    hydrogens = np.flatnonzero(last.numbers == 1)
    of_oxygen = int(hydrogens[last.get_distances(13, hydrogens, mic=True).argmin()])
    assert last.numbers[13] == 8
    last.positions[12:] += (1.0, 0.0, 0.0)
    found = nearest_copy(first, last, clean)
    assert int(hydrogens[found.get_distances(13, hydrogens, mic=True).argmin()]) == of_oxygen


def test_a_copy_is_not_turned_inside_out() -> None:
    def hand(atoms: Atoms) -> float:
        return float(np.sign(np.linalg.det(atoms.positions[-3:] - atoms.positions[-4])))

    clean = slab(size=(3, 3, 3))
    # The mirror image of the end is nearer than the end by a lattice translation, but inverted at nitrogen.
    for turn in (10.0, 20.0):
        first = with_adsorbate(clean, "NH3", "fcc", turn=turn)
        last = with_adsorbate(clean, "NH3", "hcp", turn=-turn)
        found = nearest_copy(first, last, clean)
        assert hand(found) == hand(last) == hand(first)
        vectors = found.positions[-4:] - first.positions[-4:]
        assert np.linalg.norm(vectors, axis=1).max() < 2.2  # 1.47 Å to the next site, and the turn


def test_ends_that_are_no_ends_are_refused(ends: list[Atoms]) -> None:
    first, last = ends
    before = [atoms.positions.copy() for atoms in ends]
    lifted = last.copy()
    lifted.set_constraint()
    lifted.positions[0, 2] -= 0.5
    cases = (
        (first, last[::-1], 3, "other atoms, another order"),
        (first, first, 3, "are the same minimum"),
        (first, lifted, 3, "an atom that is held"),
        (first, last, 0, "at least 1"),
        (first, last, 10_000, "at most 1000"),
    )
    for one, other, images, message in cases:
        with pytest.raises(InputError, match=message):
            find_path(one, other, EMT(), images=images)
    for settings in ({"fmax": float("nan")}, {"fmax": 0.0}, {"fmax": -0.1}, {"steps": -1}):
        with pytest.raises(InputError, match=f"{next(iter(settings))} is"):
            find_path(first, last, EMT(), **settings)  # type: ignore[arg-type]
    assert np.array_equal([atoms.positions for atoms in ends], before)

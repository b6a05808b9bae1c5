"""Paths between minima: ASE's own barrier, few calls, and ends that are refused."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from test_basins import slab, with_adsorbate

from equiformer2.adsorption.neb import find_path
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


def test_the_band_stays_in_its_steps(ends: list[Atoms]) -> None:
    path = find_path(*ends, EMT(), images=3, fmax=1e-4, steps=2)
    assert (path.steps, path.converged) == (2, False)
    assert path.max_force > 1e-4


def test_ends_that_are_no_ends_are_refused(ends: list[Atoms]) -> None:
    first, last = ends
    lifted = last.copy()
    lifted.set_constraint()
    lifted.positions[0, 2] -= 0.5
    cases = (
        (first, last[::-1], 3, "other atoms, another order"),
        (first, first, 3, "are the same minimum"),
        (first, lifted, 3, "an atom that is held"),
        (first, last, 0, "at least 1"),
    )
    for one, other, images, message in cases:
        with pytest.raises(InputError, match=message):
            find_path(one, other, EMT(), images=images)
    assert np.allclose(first.positions, ends[0].positions)

"""Checks of starts: every fault has its sentence, and good starts have none."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms

from equiformer2.adsorption.named_structures import build_slab, place_adsorbate
from equiformer2.adsorption.prepare import PlacementOptions, prepare_system
from equiformer2.adsorption.start_checks import check_start, image_contact


def start(size: str = "3x3") -> Atoms:
    nx, ny = map(int, size.split("x"))
    slab = build_slab("Cu111", (nx, ny, 4))
    top = slab.positions[:, 2].max()
    x, y = slab.positions[slab.positions[:, 2].argmax(), :2]
    slab.extend(Atoms("CO", [[x, y, top + 1.85], [x, y, top + 3.0]], tags=[2, 2]))
    return slab


def test_good_starts() -> None:
    assert not check_start(start(), cutoff=12.0)
    wrapped = start()
    wrapped.positions += [0.3, -4.0, 18.0]
    wrapped.wrap()
    assert not check_start(wrapped, cutoff=12.0)
    built = prepare_system("Pt111", "O", placement=PlacementOptions(site="fcc"))
    assert not check_start(built, closest=1.0)
    assert not check_start(start("1x1"))  # a full layer of CO


def test_contacts_with_images_are_found_in_skewed_cells() -> None:
    # The shortest lattice vector is the second one less three times the first.
    cell = [[10.0, 0.0, 0.0], [25.0, 8.0, 0.0], [0.0, 0.0, 30.0]]
    along = np.array([-5.0, 8.0, 0.0])
    molecule = Atoms("C7", along * np.linspace(0.0, 0.9, 7)[:, None], cell=cell, pbc=True)
    contact = image_contact(molecule, "the adsorbate")
    assert contact is not None
    assert "own periodic image" in contact
    reduced = molecule.copy()
    reduced.set_cell([cell[0], along, cell[2]])
    assert image_contact(reduced, "the adsorbate") == contact
    assert image_contact(molecule[:4], "the adsorbate") is None
    molecule.pbc = (True, False, True)
    assert image_contact(molecule, "the adsorbate") is None


def moved(atoms: Atoms, index: int, by: tuple[float, float, float]) -> Atoms:
    atoms.positions[index] += by
    return atoms


def chain() -> Atoms:
    """A molecule as long as the cell is wide."""
    atoms = start("1x3")
    atoms.positions[-1] = atoms.positions[-2] + [1.2, 0, 0]
    return atoms


def thin() -> Atoms:
    atoms = start()
    cell = atoms.cell.array.copy()
    cell[2, 2] = np.ptp(atoms.positions[:, 2]) + 3.5
    atoms.set_cell(cell)
    return atoms


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moved(start(), -1, (0, 0, 2.5)), "not one molecule: atom 1"),
        (lambda: moved(moved(start(), -1, (0, 0, -0.5)), -2, (0, 0, -0.5)), "closer than 0.8 times"),
        (lambda: moved(moved(start(), -1, (0, 0, 3)), -2, (0, 0, 3)), "touches no atom of the slab"),
        (chain, "larger than the surface: its atom [CO] is"),
        (thin, "contact through the vacuum of 6"),
        (lambda: start()[:-2], "tag the adsorbate's with 2"),
        (lambda: moved(start(), 0, (np.nan, 0, 0)), "non-finite position"),
        (lambda: moved(start(), -1, (0, 0, -1.15)), "atoms 36 .* and 37 .* are 0 Å apart"),
    ],
)
def test_faults(make: Callable[[], Atoms], message: str) -> None:
    faults = check_start(make())
    assert len(faults) >= 1
    assert any(re.search(message, fault) for fault in faults), faults


def test_cutoff_and_limits() -> None:
    assert "thinner than the cutoff of 25 Å" in check_start(start(), cutoff=25.0)[0]
    assert "closer than 1 times" in check_start(start(), closest=1.0)[0]


def test_inside_the_slab() -> None:
    slab = build_slab("Cu111", (3, 3, 4), free_layers=1)
    system = place_adsorbate(slab, Atoms("H"), site="fcc")
    system.positions[-1, 2] = slab.positions[:, 2].max() - 1.04  # between the layers
    faults = check_start(system)
    assert any("inside the slab" in fault for fault in faults), faults


def test_several_adsorbates() -> None:
    atoms = start("4x3")
    other = atoms[-2:].copy()
    other.positions += atoms.cell[0] / 2
    atoms.extend(other)
    assert any("not one molecule" in fault for fault in check_start(atoms))
    assert not check_start(atoms, molecules=[(48, 49), (50, 51)])
    atoms.positions[-2:] -= atoms.cell[0] / 2 * 0.7
    assert any("adsorbates 0 and 1 touch" in f for f in check_start(atoms, molecules=[(48, 49), (50, 51)]))

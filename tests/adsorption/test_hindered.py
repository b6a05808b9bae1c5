"""Hindered translation and rotation beside ASE's own example, and what is taken from a search."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.io import write
from ase.thermochemistry import HinderedThermo
from test_basins import slab, with_adsorbate

from equiformer2.adsorption.finished_search import FinishedSearch
from equiformer2.adsorption.hindered import HinderedMotion, hindered_motion
from equiformer2.adsorption.neb import EnergyPath
from equiformer2.errors import InputError

# Ethane on Pt(111), the example of ASE's documentation.
ETHANE = (
    *(3049.060670, 3040.796863, 3001.661338, 2997.961647, 2866.153162, 2750.855460, 1436.792655, 1431.413595),
    *(1415.952186, 1395.726300, 1358.412432, 1335.922737, 1167.009954, 1142.126116, 1013.918680, 803.400098),
    *(783.026031, 310.448278, 136.112935, 112.939853, 103.926392, 77.262869, 60.278004, 25.825447),
)
MOTION = HinderedMotion(0.049313, 0.017675, 1.5e15, 6, 73.149, 30.07)


def test_the_example_of_ase() -> None:
    found = MOTION.thermo(np.array(ETHANE), 298.15, 1e-3)
    helmholtz = found["zpe_eV"] + found["heat_eV"] - found["entropy_eV"]
    assert helmholtz == pytest.approx(1.593, abs=1e-3)
    own = HinderedThermo(
        np.array(ETHANE) * units.invcm, 0.049313, 0.017675, 1.5e15, 6, mass=30.07, inertia=73.149
    )
    assert found["entropy_eV"] == pytest.approx(298.15 * own.get_entropy(298.15, verbose=False), abs=1e-6)
    assert found["zpe_eV"] == pytest.approx(own.get_zero_point_energy(), abs=1e-6)


def test_imaginary_modes_are_among_the_replaced() -> None:
    modes = np.array(ETHANE)
    modes[-1] = -300.0
    assert MOTION.thermo(modes, 298.15, 50.0) == MOTION.thermo(np.array(ETHANE), 298.15, 50.0)


def test_what_has_no_answer_is_refused() -> None:
    with pytest.raises(InputError, match="3 modes"):
        MOTION.thermo(np.array([100.0, 200.0, 300.0]), 298.15, 50.0)
    with pytest.raises(InputError, match=r"at 0\.1 K nothing crosses"):
        MOTION.thermo(np.array(ETHANE), 0.1, 50.0)


def search(tmp_path: Path, adsorbate: str, minima: dict[str, tuple[Atoms, float]]) -> FinishedSearch:
    """Finished search with these minima (structure, energy), the first one the best."""
    (tmp_path / "trajectories").mkdir(exist_ok=True)
    rows = []
    for name, (atoms, energy) in minima.items():
        atoms.write(tmp_path / "trajectories" / f"{name}.traj")
        rows.append({"id": name, "basin": name, "merged_into": None, "energy_eV": energy})
    best = next(iter(minima))
    record = {"placements": rows, "best": {"id": best}}
    return FinishedSearch(tmp_path, record, minima[best][0], slab(size=(2, 2, 3)))


def flat(name: str, site: str) -> Atoms:
    """CO that lies along x, its middle on the site."""
    atoms = with_adsorbate(slab(size=(2, 2, 3)), name, site)
    atoms.positions[-1] = atoms.positions[-2] + [0.575, 0.0, 0.0]
    atoms.positions[-2] -= [0.575, 0.0, 0.0]
    return atoms


def turned(atoms: Atoms) -> Atoms:
    """The same, turned by 90 degrees about the middle of the molecule."""
    atoms = atoms.copy()
    middle = atoms.positions[-2:].mean(axis=0)
    for one in (-2, -1):
        arm = atoms.positions[one] - middle
        atoms.positions[one] = middle + np.array([-arm[1], arm[0], arm[2]])
    return atoms


def test_barriers_are_those_of_the_search(tmp_path: Path) -> None:
    start = flat("CO", "ontop")
    other = start.copy()
    other.positions[-2:] += [1.275, 0.0, 0.0]  # to the bridge
    found = search(tmp_path, "CO", {"a": (start, -1.0), "b": (other, -0.8), "c": (turned(start), -0.9)})
    motion = hindered_motion(found)
    assert motion.translation_barrier == pytest.approx(0.2)
    assert motion.rotation_barrier == pytest.approx(0.1)
    assert "lower bound" in motion.sources["translation_barrier"]
    assert motion.mass == pytest.approx(28.01, abs=0.01)
    assert motion.inertia == pytest.approx(12.011 * 15.999 / 28.01 * 1.15**2, abs=0.01)
    area = np.linalg.norm(np.cross(*start.cell[:2])) * 1e-16
    assert motion.site_density == pytest.approx(4 / area)
    # Sites are those of the upper side, whichever way the lattice vectors are listed.
    left = found.clean_slab.copy()
    left.extend(Atoms("Cu", [left.positions[0] - (0.0, 0.0, 2.0)]))
    left.set_cell(left.cell.array[[1, 0, 2]])
    best = left + start[-2:]
    other_handed = FinishedSearch(tmp_path, found.record, best, left)
    assert hindered_motion(other_handed, 0.1, 0.1, 3).site_density == pytest.approx(4 / area)
    # A band between them is better than a difference, whichever way it was made.
    band(tmp_path, "b-a", [other, start], [0.0, 0.3, -0.2])
    assert hindered_motion(found).translation_barrier == pytest.approx(0.5)
    given = hindered_motion(found, 0.4, 0.05, 3)
    assert (given.translation_barrier, given.rotation_barrier, given.rotational_minima) == (0.4, 0.05, 3)
    assert given.sources["rotation_barrier"] == "given"


def test_symmetry_is_that_of_the_slab_as_it_was_cut(tmp_path: Path) -> None:
    start = flat("CO", "fcc")
    found = search(tmp_path, "CO", {"a": (start, -1.0)})
    noise = np.random.default_rng(0).normal(0.0, 0.005, (8, 3))
    noisy = found.clean_slab.copy()
    noisy.positions[4:] += noise
    found = FinishedSearch(tmp_path, found.record, found.best, noisy)
    assert len(found.symmetry()) == 1
    write(tmp_path / "trajectories" / "clean_slab.traj", [slab(size=(2, 2, 3)), noisy])
    assert len(found.symmetry()) == 24
    assert hindered_motion(found, 0.1, 0.1).rotational_minima == 3


def band(folder: Path, name: str, ends: list[Atoms], energies: list[float]) -> None:
    """Converged path between two minima, with the barriers that `adsorption neb` counts."""
    (folder / "neb" / name).mkdir(parents=True)
    write(folder / "neb" / name / "neb.traj", ends)
    path = EnergyPath(ends, np.array(energies), True, 0.01, 10, 50)
    first, last = name.split("-")
    record = {**path.summary(), "start": first, "end": last}
    (folder / "neb" / name / "neb.json").write_text(json.dumps(record))


def test_the_climb_of_a_band_begins_at_the_best_minimum(tmp_path: Path) -> None:
    start = flat("CO", "ontop")
    other, copy = start.copy(), start.copy()
    other.positions[-2:] += [1.275, 0.0, 0.0]
    copy.positions[-2:] += [2.55, 0.0, 0.0]  # on the next atom
    found = search(tmp_path, "CO", {"a": (start, -1.0), "b": (other, -0.8), "c": (turned(start), -0.9)})
    # It crosses another minimum, and the barrier is above the best one.
    energies = [0.0, 0.25, 0.02, 0.5, 0.2]
    band(tmp_path, "a-b", [start, other], energies)
    record = json.loads((tmp_path / "neb" / "a-b" / "neb.json").read_text())
    assert record["barrier_eV"] == pytest.approx(0.5)
    assert record["reverse_barrier_eV"] == pytest.approx(0.3)
    assert hindered_motion(found).translation_barrier == pytest.approx(0.5)
    # Here it begins at a minimum between the ends, 0.01 eV below the best one.
    shutil.rmtree(tmp_path / "neb")
    band(tmp_path, "a-b", [start, other], [0.0, 0.1, -0.01, 0.4, 0.2])
    record = json.loads((tmp_path / "neb" / "a-b" / "neb.json").read_text())
    assert record["barrier_eV"] == pytest.approx(0.41)
    assert hindered_motion(found).translation_barrier == pytest.approx(0.4)
    # Between two copies of the best minimum it is a translation, too; a turn on the site is none.
    band(tmp_path, "a-a", [start, copy], [0.0, 0.33, 0.0])
    band(tmp_path, "a-c", [start, turned(start)], [0.0, 0.15, 0.1])
    motion = hindered_motion(found)
    assert (motion.translation_barrier, motion.rotation_barrier) == pytest.approx((0.33, 0.15))
    assert motion.sources["translation_barrier"] == "elastic band a-a"
    band(tmp_path, "b-a", [other, start], [-0.1, 0.2, -0.4, 0.3, 0.0])
    with pytest.raises(InputError, match=r"image 2 of the elastic band b-a lies 0\.400 eV below the best"):
        hindered_motion(found)
    assert hindered_motion(found, 0.1, 0.1).translation_barrier == 0.1


def test_rotational_minima_are_the_rotations_about_the_site(tmp_path: Path) -> None:
    start = flat("CO", "ontop")
    found = search(tmp_path, "CO", {"a": (start, -1.0)})
    assert hindered_motion(found, 0.1, 0.1).rotational_minima == 3


@pytest.mark.parametrize(
    ("adsorbate", "given", "message"),
    [
        ("O", (0.1, 0.1), "one atom has no rotor"),
        ("CO", (0.1, 0.1), "stands upright"),
        ("flat", (None, 0.1), "--translation-barrier"),
        ("flat", (0.1, None), "--rotation-barrier"),
        ("flat", (0.1, -1.0), "rotation of the hindered motion is -1"),
        ("flat", (0.1, 0.1, 0), "minima of the hindered motion is 0"),
    ],
)
def test_adsorbates_without_such_motions_are_refused(
    tmp_path: Path, adsorbate: str, given: tuple[float | None, ...], message: str
) -> None:
    atoms = (
        flat("CO", "ontop")
        if adsorbate == "flat"
        else with_adsorbate(slab(size=(2, 2, 3)), adsorbate, "ontop")
    )
    with pytest.raises(InputError, match=message):
        hindered_motion(search(tmp_path, adsorbate, {"a": (atoms, -1.0)}), *given)  # type: ignore[arg-type]

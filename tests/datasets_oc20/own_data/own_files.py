"""Structures and files as users of DFT codes have them."""

from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from datasets_oc20.own_data import source_worker
from datasets_oc20.own_data.importer import ImportOptions, import_files
from datasets_oc20.own_data.labels import LabelOptions
from datasets_oc20.own_data.report import ImportReport

DATA = Path(__file__).parents[2] / "data/own_data"


def labelled(atoms: Atoms, energy: float | None = None, **results: Any) -> Atoms:
    """The structure with the energy and forces of EMT as stored results."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
    found |= {"energy": energy} if energy is not None else {}
    found |= results
    atoms.calc = SinglePointCalculator(atoms, **{k: v for k, v in found.items() if v is not None})
    return atoms


def slab(element: str = "Pt", seed: int = 0, amount: float = 0.05) -> Atoms:
    """Rattled slab with two fixed layers and no tags."""
    atoms = fcc111(element, (2, 2, 3), vacuum=8.0, periodic=True)
    atoms.set_tags(0)
    atoms.rattle(amount, seed=seed)
    atoms.set_constraint(FixAtoms(range(8)))
    return atoms


def trajectory(atoms: Atoms, steps: int = 8, amount: float = 0.01) -> list[Atoms]:
    """Small steps from a structure, as in a relaxation, with EMT's energies and forces."""
    frames, random = [], np.random.default_rng(1)
    atoms = atoms.copy()
    for _ in range(steps):
        frames.append(labelled(atoms))
        moved = random.normal(scale=amount, size=(len(atoms), 3))
        for constraint in atoms.constraints:
            moved[constraint.index] = 0.0
        atoms.positions += moved
    return frames


def crystals(sizes: tuple[int, ...] = (1, 2, 3)) -> list[Atoms]:
    """Rattled crystals of several sizes."""
    found = []
    for seed, size in enumerate(sizes):
        atoms = bulk("Cu", cubic=True).repeat((size, 1, 1))
        atoms.rattle(0.05, seed=seed)
        found.append(labelled(atoms))
    return found


@pytest.fixture
def in_folder(tmp_path: Path) -> Iterator[Path]:
    """The test's folder, in which the test runs, so that messages have short names."""
    with chdir(tmp_path):
        yield tmp_path


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes read parts of a file, however small it is."""
    for name, value in (("LARGE_SOURCE", 0), ("_PART", 4), ("_WAITING", 2)):
        monkeypatch.setattr(source_worker, name, value)


Change = Callable[[list[Atoms]], list[Atoms]]


def run(*paths: object, out: str = "out.lmdb", mixed: bool = False, **settings: object) -> ImportReport:
    """Import files in this process, with settings of the import or of the labels."""
    options = ImportOptions(LabelOptions(), mixed=mixed)
    for name, value in settings.items():
        target = options if hasattr(options, name) else options.labels
        object.__setattr__(target, name, value)
    return import_files([Path(str(path)) for path in paths], out, options, num_workers=1, progress=False)

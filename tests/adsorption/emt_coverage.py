"""Copper slab of the tests of coverage, and energies of EMT to compare with."""

from ase import Atoms
from ase.calculators.emt import EMT
from ase.optimize import LBFGS

from equiformer2.adsorption.coverage_series import CoverageSettings
from equiformer2.adsorption.named_structures import build_slab


def slab() -> Atoms:
    return build_slab("Cu111", (2, 2, 3))


def relaxed_energy(atoms: Atoms, settings: CoverageSettings) -> float:
    """Energy after ASE's own relaxation, eV."""
    copy = atoms.copy()
    copy.calc = EMT()
    LBFGS(copy, logfile=None, maxstep=0.04).run(fmax=settings.fmax, steps=settings.steps)
    return float(copy.get_potential_energy())

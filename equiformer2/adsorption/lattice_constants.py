"""Lattice constants of bulks: relaxed with a calculator, or of a table, and the strain of a slab beside them.

A slab cut at the lattice constant of another method is strained, which shifts adsorption energies. A
calculator of total energies can relax the bulk; a model of adsorption energies cannot, and for it there is a
table of RPBE, OC20's functional.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import spglib
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS
from scipy.optimize import minimize_scalar

from equiformer2.adsorption.bulks import Bulk, find_bulk
from equiformer2.errors import InputError
from equiformer2.inference.named_calculators import calculator_errors, resolve_energy_kind

RPBE_SOURCE = (
    "VASP 4.6, RPBE, PAW, 400 eV, 11x11x11 k-points; N. López group, ICIQ, 'Cell parameters', "
    "https://usrc.iciq.cat/wiki/index.php/Cell_parameters"
)
RPBE_FCC = {
    "Ag": 4.227,
    "Au": 4.208,
    "Cu": 3.676,
    "Ir": 3.879,
    "Ni": 3.551,
    "Pd": 3.987,
    "Pt": 3.990,
    "Rh": 3.856,
}
"""Å, lattice constants of fcc metals with RPBE (`RPBE_SOURCE`)."""

MOST_STRAIN = 0.01
"""Strain of a lattice vector above which a slab is warned of."""

_RANGE = 0.12
"""Largest change of a lattice constant that is searched, as a fraction."""

_ENOUGH = 1e-5
"""Fraction of the lattice constant to which it is searched."""

_FIRST_CUBIC = 195
"""Number of the first cubic space group."""

_SYMPREC = 0.01
"""Å; tolerance of the search for symmetry."""


@dataclass(frozen=True)
class RelaxedBulk:
    """A bulk at the lattice constants of a method.

    Attributes:
        bulk: the bulk, relaxed.
        method: what was done: "energy", "stress" or "table".
        strain: change of the cube root of the volume, as a fraction of the given one.
        energy: eV of the cell; None from the table.
        converged: the optimizer reached its threshold.
        notices: sentences that users should read.
    """

    bulk: Bulk
    method: str
    strain: float
    energy: float | None
    converged: bool
    notices: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        lengths = self.bulk.atoms.cell.cellpar()
        return {
            "bulk": self.bulk.name,
            "method": self.method,
            "cell_A_degrees": [round(float(value), 5) for value in lengths],
            "lattice_constant_A": self.bulk.lattice_constant,
            "strain": round(self.strain, 6),
            "energy_eV": self.energy,
            "converged": self.converged,
            "notices": list(self.notices),
        }


def relaxed_bulk(
    bulk: Any,
    calculator: BaseCalculator | None,
    *,
    fmax: float = 0.02,
    steps: int = 200,
    energy_kind: str | None = None,
) -> RelaxedBulk:
    """Bring a bulk to the lattice constants of a calculator's own functional.

    Cubic bulks whose atoms symmetry holds (fcc, bcc, sc, diamond, rocksalt, …) get the lattice constant of
    the lowest energy. Others are relaxed with the stress by ASE's `FrechetCellFilter`, positions included;
    without a stress their shape is kept and only the volume is searched, which a notice says. With a
    calculator of adsorption energies, or none, the table of RPBE is used for the fcc metals that it has, and
    nothing is changed for others, which a notice says.

    Args:
        bulk: what `find_bulk` takes.
        calculator: an ASE calculator, or None.
        fmax: threshold of forces and stress of the relaxation with a stress, eV/Å.
        steps: maximum number of steps of it.
        energy_kind: as in `resolve_energy_kind`.

    Raises:
        InputError: no bulk, or no lowest energy near its lattice constant.
    """
    found = find_bulk(bulk)
    if calculator is None or resolve_energy_kind(calculator, energy_kind) != "total":
        return _from_table(found)
    if _Relaxing.is_cubic(found.atoms) and not _Relaxing.has_forces(found.atoms, calculator):
        return _Relaxing.by_energy(found, calculator, ())
    if _Relaxing.has_stress(found.atoms, calculator):
        return _Relaxing.by_stress(found, calculator, fmax, steps)
    return _Relaxing.by_energy(
        found,
        calculator,
        (
            f"the calculator has no stress: only the volume of {found.name} was relaxed, its shape and "
            "positions were kept",
        ),
    )


def strain_notices(bulk: Bulk) -> tuple[str, ...]:
    """Warn of a bulk that is strained against the table of RPBE; none for bulks that the table lacks."""
    symbol = _fcc_metal(bulk.atoms)
    if symbol not in RPBE_FCC:
        return ()
    a = (4 * bulk.atoms.get_volume() / len(bulk.atoms)) ** (1 / 3)
    strain = a / RPBE_FCC[symbol] - 1
    if abs(strain) <= MOST_STRAIN:
        return ()
    return (
        f"{bulk.name} has the lattice constant {a:.3f} Å, {strain:+.1%} from RPBE's {RPBE_FCC[symbol]:.3f} "
        f"Å: its slabs are strained for a model of OC20 (give a={RPBE_FCC[symbol]:g})",
    )


def _from_table(bulk: Bulk) -> RelaxedBulk:
    symbol = _fcc_metal(bulk.atoms)
    if symbol not in RPBE_FCC:
        notice = (
            f"no lattice constant of RPBE is known for {bulk.name}, and a model of adsorption energies "
            "cannot relax a bulk: its slabs may be strained by some per cent"
        )
        return RelaxedBulk(bulk, "table", 0.0, None, False, (notice,))
    a = (4 * bulk.atoms.get_volume() / len(bulk.atoms)) ** (1 / 3)
    strain = RPBE_FCC[symbol] / a - 1
    notice = f"{bulk.name} has the lattice constant {RPBE_FCC[symbol]:.3f} Å of RPBE ({RPBE_SOURCE})"
    return RelaxedBulk(_Relaxing.scaled(bulk, 1 + strain), "table", strain, None, True, (notice,))


def _fcc_metal(atoms: Atoms) -> str:
    """Element of an fcc crystal in whatever cell; empty for everything else."""
    symbols = set(atoms.get_chemical_symbols())
    if len(symbols) != 1:
        return ""
    # Twelve nearest neighbours and six in the second shell, at every atom.
    nearest = (np.sqrt(2.0) * atoms.get_volume() / len(atoms)) ** (1 / 3)
    counts = np.bincount(neighbor_list("i", atoms, 1.2 * nearest), minlength=len(atoms))
    near, far = (neighbor_list("d", atoms, factor * nearest) for factor in (1.2, 1.45))
    is_fcc = (counts == 12).all() and len(far) == 18 * len(atoms)
    return next(iter(symbols)) if is_fcc and np.abs(near / nearest - 1).max() < 0.02 else ""


class _Relaxing:
    """Ways of relaxing a bulk, and what decides between them."""

    @staticmethod
    def by_energy(bulk: Bulk, calculator: BaseCalculator, notices: tuple[str, ...]) -> RelaxedBulk:
        """Search the scale of the cell with the lowest energy."""

        def energy(scale: float) -> float:
            atoms = _Relaxing.scaled(bulk, scale).atoms
            atoms.calc = calculator
            with calculator_errors(calculator, bulk.name):
                value = float(atoms.get_potential_energy())
            if not math.isfinite(value):
                raise InputError(f"the energy of {bulk.name} at {scale - 1:+.1%} strain is {value}")
            return value

        scale = _Relaxing._lowest(energy, bulk.name)
        return RelaxedBulk(_Relaxing.scaled(bulk, scale), "energy", scale - 1, energy(scale), True, notices)

    @staticmethod
    def by_stress(bulk: Bulk, calculator: BaseCalculator, fmax: float, steps: int) -> RelaxedBulk:
        """Relax cell and positions with the stress."""
        atoms = bulk.atoms.copy()
        atoms.calc = calculator
        with (
            calculator_errors(calculator, bulk.name),
            BFGS(cast(Any, FrechetCellFilter(atoms)), logfile=None) as optimizer,
        ):
            converged = bool(optimizer.run(fmax=fmax, steps=steps))
            energy = float(atoms.get_potential_energy())
        atoms.calc = None
        if not np.isfinite(atoms.positions).all() or not math.isfinite(energy):
            raise InputError(f"the relaxation of {bulk.name} went to infinity: give a better start")
        strain = (atoms.get_volume() / bulk.atoms.get_volume()) ** (1 / 3) - 1
        if abs(strain) > _RANGE:
            raise InputError(
                f"the relaxation of {bulk.name} changed its lattice constant by {strain:+.0%}: give a nearer "
                "start, or another calculator"
            )
        notices = () if converged else (f"the relaxation of {bulk.name} did not converge in {steps} steps",)
        return RelaxedBulk(
            Bulk(atoms, bulk.name, bulk.crystal, bulk.notices), "stress", strain, energy, converged, notices
        )

    @staticmethod
    def scaled(bulk: Bulk, scale: float) -> Bulk:
        """Copy a bulk with all its lengths scaled."""
        atoms = bulk.atoms.copy()
        atoms.set_cell(atoms.cell.array * scale, scale_atoms=True)
        # A lattice constant taken from the elements is replaced, and so is its notice.
        return Bulk(atoms, bulk.name, bulk.crystal)

    @staticmethod
    def is_cubic(atoms: Atoms) -> bool:
        """Tell whether the crystal is cubic: its cell (sc, fcc or bcc) and the atoms in it.

        Layers of two elements in a cubic cell, such as L1_0 with c = a, are tetragonal: nothing but the start
        keeps their cell cubic.
        """
        try:
            name = atoms.cell.get_bravais_lattice(eps=1e-4).name
        except RuntimeError:  # ASE's word for a cell that it does not recognise
            return False
        if name not in ("CUB", "FCC", "BCC"):
            return False
        crystal = atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers
        found = spglib.get_symmetry_dataset(crystal, symprec=_SYMPREC)
        return found is not None and found.number >= _FIRST_CUBIC

    @staticmethod
    def has_forces(atoms: Atoms, calculator: BaseCalculator) -> bool:
        """Tell whether atoms of the bulk are off their places, so that there is more than the lattice."""
        if len(atoms) == 1:
            return False
        copy = atoms.copy()
        copy.calc = calculator
        try:
            return bool(np.abs(copy.get_forces()).max() > 0.01)
        except (PropertyNotImplementedError, NotImplementedError):
            return False  # a model of energies alone: only the lattice can be optimized

    @staticmethod
    def has_stress(atoms: Atoms, calculator: BaseCalculator) -> bool:
        copy = atoms.copy()
        copy.calc = calculator
        try:
            copy.get_stress()
        except (PropertyNotImplementedError, NotImplementedError):
            return False
        return True

    @staticmethod
    def _lowest(energy: Callable[[float], float], name: str) -> float:
        """Scale of the lowest energy within `_RANGE`: on a grid, against other minima, then Brent."""
        grid = np.linspace(1 - _RANGE, 1 + _RANGE, 13)
        values = [energy(scale) for scale in grid]
        best = int(np.argmin(values))
        if best in (0, len(grid) - 1):
            raise InputError(
                f"the energy of {name} has no minimum within {_RANGE:.0%} of its lattice constant: give "
                "one that is nearer, or another calculator"
            )
        found = minimize_scalar(
            energy,
            bracket=(grid[best - 1], grid[best], grid[best + 1]),
            method="brent",
            options={"xtol": _ENOUGH},
        )
        return float(found.x)

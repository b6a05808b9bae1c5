"""Surface energies of slabs with a calculator of total energies, and slabs in their order.

A slab of n bulk cells has two sides of the area A, and (E(slab) - n E(bulk)) / 2A is the mean of their
surface energies: that of the surface where both sides are the same. The bulk's energy is the same
calculator's at the lattice constants of the slab, so that a strained bulk shifts nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.units import J, m
from tqdm import tqdm

from equiformer2.adsorption.slabs import CleanSlab
from equiformer2.errors import InputError
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.many import relax_many
from equiformer2.inference.named_calculators import calculator_errors, resolve_energy_kind

J_M2 = float(m**2 / J)
"""J/m² of 1 eV/Å²."""

UNKNOWN = "a model of adsorption energies knows no clean slab, and so no surface or cleavage energies"
"""Sentence about models that cannot have surface energies."""

_METHOD = "(E(slab) - n E(bulk)) / 2A, the mean of both sides"


@dataclass(frozen=True)
class SurfaceEnergy:
    """Surface energy of one slab.

    Attributes:
        slab: its origin.
        miller: Miller indices; None where they are not known.
        termination: its number; None where it is not known.
        area: Å² of one side.
        cells: number of bulk cells in the slab.
        sides_differ: the two sides differ, so that the energy is that of neither.
        value: eV/Å²; None where the slab has none.
        converged: False for a relaxation that took all its steps.
        reason: sentence for a missing value.
    """

    slab: str
    miller: tuple[int, int, int] | None
    termination: int | None
    area: float
    cells: float | None
    sides_differ: bool
    value: float | None
    converged: bool = True
    reason: str = ""

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {
            "slab": self.slab,
            "miller": None if self.miller is None else list(self.miller),
            "termination": self.termination,
            "surface_energy_eV_A2": self.value,
            "surface_energy_J_m2": None if self.value is None else self.value * J_M2,
            "area_A2": self.area,
            "bulk_cells": self.cells,
            "sides_differ": self.sides_differ,
            "converged": self.converged,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class SurfaceEnergies:
    """Surface energies, the lowest first; slabs without one come last.

    Attributes:
        rows: one per slab.
        method: how they were calculated, in words.
        notices: sentences that users should read.
    """

    rows: tuple[SurfaceEnergy, ...] = ()
    method: str = ""
    notices: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {
            "method": self.method,
            "rows": [row.summary() for row in self.rows],
            "notices": list(self.notices),
        }

    def __str__(self) -> str:
        width = max([len(row.slab) for row in self.rows] + [4])
        lines = [
            f"surface energy, {self.method}",
            f"{'slab':{width}} {'eV/Å²':>9} {'J/m²':>8}  sides",
        ]
        for row in self.rows:
            if row.value is None:
                lines.append(f"{row.slab:{width}}  {row.reason}")
                continue
            sides = "differ: mean of two surfaces" if row.sides_differ else "same"
            left = "" if row.converged else ", NOT converged"
            lines.append(f"{row.slab:{width}} {row.value:9.5f} {row.value * J_M2:8.4f}  {sides}{left}")
        return "\n".join(lines)


def surface_energies(
    slabs: Sequence[CleanSlab],
    calculator: BaseCalculator,
    *,
    relaxed: RelaxationSettings | None = None,
    energy_kind: str | None = None,
    progress: bool = False,
) -> SurfaceEnergies:
    """Compute the surface energy of every slab.

    A slab whose composition is not that of its bulk has none, because it depends on a chemical potential; so
    has one from a file, whose bulk is not known. Both are listed with the reason.

    Args:
        slabs: of `slabs_of_bulk` or `find_slab`.
        calculator: an ASE calculator of total energies.
        relaxed: settings with which every slab is relaxed first, all its atoms free, since both sides count;
            None takes the slabs as they were cut.
        energy_kind: as in `resolve_energy_kind`.
        progress: show a progress bar on standard error.

    Raises:
        InputError: a model of adsorption energies, or a calculator that fails.
    """
    if resolve_energy_kind(calculator, energy_kind) != "total":
        raise InputError(f"{UNKNOWN}: give a calculator of total energies")
    known: dict[int, float] = {}
    rows = []
    for slab in tqdm(slabs, desc="surface energies", unit="slab", disable=not progress, leave=False):
        area = surface_area(slab.atoms)
        report = slab.report
        cells, value, converged, reason = None, None, True, ""
        try:
            cells = bulk_cells(slab)
            assert slab.bulk is not None  # else it has no number of bulk cells
            if id(slab.bulk) not in known:
                known[id(slab.bulk)] = unrelaxed_energy(slab.bulk.atoms, calculator)
            energy, converged = _slab_energy(slab.atoms, calculator, relaxed)
            value = (energy - cells * known[id(slab.bulk)]) / (2 * area)
        except InputError as error:
            reason = str(error)
        rows.append(
            SurfaceEnergy(
                report.origin,
                report.miller,
                report.termination,
                area,
                cells,
                report.asymmetric,
                value,
                converged,
                reason,
            )
        )
    rows.sort(key=lambda row: math.inf if row.value is None else row.value)
    state = "of slabs as they were cut" if relaxed is None else f"of slabs relaxed to {relaxed.fmax:g} eV/Å"
    return SurfaceEnergies(tuple(rows), f"{_METHOD}, {state}", _notices(rows))


def ranked_slabs(
    slabs: Sequence[CleanSlab], calculator: BaseCalculator, *, energy_kind: str | None = None
) -> tuple[list[CleanSlab], SurfaceEnergies]:
    """Bring several slabs into the order of their surface energies, the most stable first.

    The slabs are taken as they were cut. A model of adsorption energies knows no order, which a notice says,
    and the slabs keep theirs; so does a single slab, for which nothing is calculated.

    Raises:
        InputError: what `surface_energies` raises.
    """
    if len(slabs) < 2:
        return list(slabs), SurfaceEnergies()
    if resolve_energy_kind(calculator, energy_kind) != "total":
        return list(slabs), SurfaceEnergies(notices=(f"{UNKNOWN}: the slabs are not ranked by stability",))
    energies = surface_energies(slabs, calculator, energy_kind=energy_kind, progress=True)
    place = {row.slab: number for number, row in enumerate(energies.rows)}
    return sorted(slabs, key=lambda slab: place[slab.report.origin]), energies


def surface_area(slab: Atoms) -> float:
    """Area of one side of a slab, Å²."""
    return float(np.linalg.norm(np.cross(*slab.cell.array[:2])))


def bulk_cells(slab: CleanSlab) -> float:
    """Number of bulk cells in a slab.

    Raises:
        InputError: its bulk is not known, or has another composition.
    """
    if slab.bulk is None:
        raise InputError("the bulk of a slab from a file is not known: cut the slab out of its bulk")
    atoms, cell = slab.atoms, slab.bulk.atoms
    cells = len(atoms) / len(cell)
    size = int(max(atoms.numbers.max(), cell.numbers.max())) + 1
    excess = np.bincount(atoms.numbers, minlength=size) - cells * np.bincount(cell.numbers, minlength=size)
    if np.abs(excess).max() > 1e-6:
        formulas = (atoms.get_chemical_formula("metal"), cell.get_chemical_formula("metal"))
        raise InputError(
            f"the slab {formulas[0]} has another composition than its bulk {formulas[1]}, so its surface "
            "energy depends on a chemical potential"
        )
    return cells


def unrelaxed_energy(atoms: Atoms, calculator: BaseCalculator) -> float:
    """Energy of a structure as it is, eV.

    Raises:
        InputError: the calculator fails, or its energy is not finite.
    """
    copy = atoms.copy()
    copy.calc = calculator
    with calculator_errors(calculator, copy.get_chemical_formula("metal")):
        value = float(copy.get_potential_energy(apply_constraint=False))
    if not math.isfinite(value):
        raise InputError("the calculator's energy is not finite")
    return value


def _slab_energy(
    slab: Atoms, calculator: BaseCalculator, settings: RelaxationSettings | None
) -> tuple[float, bool]:
    """Energy of a slab, eV, relaxed with all its atoms free where there are settings; and if it converged."""
    if settings is None:
        return unrelaxed_energy(slab, calculator), True
    free = slab.copy()
    free.set_constraint()
    (result,) = relax_many([free], calculator, settings=settings)
    if result.energy_eV is None or result.status == "failed":
        raise InputError(f"the slab cannot be relaxed: {result.reason}")
    return result.energy_eV, result.converged


def _notices(rows: Sequence[SurfaceEnergy]) -> tuple[str, ...]:
    differing = [row.slab for row in rows if row.sides_differ and row.value is not None]
    if not differing:
        return ()
    return (
        f"{', '.join(differing[:3])}{', …' if len(differing) > 3 else ''}: the two sides differ, so the "
        "surface energy is the mean of both and ranks neither alone",
    )

"""Convergence of an energy with the slab: its layers, its vacuum and its width."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.neighborlist import neighbor_list
from tqdm import tqdm

from equiformer2.adsorption.bulks import Bulk, find_bulk
from equiformer2.adsorption.dispersion_terms import refuse_dispersion
from equiformer2.adsorption.placements import Adsorbate, Placement, placements
from equiformer2.adsorption.slabs import THICKNESS, VACUUM, WIDTH, CleanSlab, slabs_of_bulk
from equiformer2.adsorption.surface_energy import (
    J_M2,
    UNKNOWN,
    bulk_cells,
    surface_area,
    unrelaxed_energy,
)
from equiformer2.errors import InputError
from equiformer2.inference.named_calculators import resolve_energy_kind

THICKNESSES = (4.0, 7.0, 10.0, 14.0)
VACUUMS = (10.0, 15.0, 20.0, 30.0)
WIDTHS = (5.0, 8.0, 11.0)
"""Å that are tried, each with OC20's values of the other two."""

_BOX = 10.0
"""Å of vacuum on every side of an adsorbate by itself."""

_AROUND, _BELOW, _NEAREST = 6.0, 3.0, 12
"""Å around and below a site, and number of atoms of each element there, that tell it from others."""

_SAME_SITE = 0.1
"""Å; distances around the same site of two slabs differ by rounding only."""

SURFACE_ENERGY, ADSORPTION_ENERGY = "surface_energy_eV_A2", "adsorption_energy_eV"


@dataclass(frozen=True)
class ConvergenceRow:
    """One slab of a convergence table.

    Attributes:
        varied: "thickness", "vacuum" or "width".
        thickness, vacuum, width: Å that the slab has at least.
        atoms: number of atoms.
        value: the energy, in the unit of the table; None where the slab has none.
        reason: sentence for a missing value.
        change: value minus that of the largest slab of the same kind.
    """

    varied: str
    thickness: float
    vacuum: float
    width: float
    atoms: int
    value: float | None
    reason: str = ""
    change: float | None = None

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record; value and change are in the unit of the table."""
        return {
            "varied": self.varied,
            "thickness_A": self.thickness,
            "vacuum_A": self.vacuum,
            "width_A": self.width,
            "atoms": self.atoms,
            "value": self.value,
            "change": self.change,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Convergence:
    """A table of energies over slabs.

    Attributes:
        quantity: `SURFACE_ENERGY` or `ADSORPTION_ENERGY`.
        slab: origin of the slab.
        adsorbate: its formula; empty without one.
        rows: the table.
        notices: sentences that users should read, about a dipole and about the lattice constant.
    """

    quantity: str
    slab: str
    adsorbate: str
    rows: tuple[ConvergenceRow, ...]
    notices: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {
            "quantity": self.quantity,
            "slab": self.slab,
            "adsorbate": self.adsorbate,
            "rows": [row.summary() for row in self.rows],
            "notices": list(self.notices),
        }

    def __str__(self) -> str:
        is_surface = self.quantity == SURFACE_ENERGY
        digits = 5 if is_surface else 4
        unit = "eV/Å²" if is_surface else "eV"
        what = "surface energy" if is_surface else f"adsorption energy of {self.adsorbate}, nothing relaxed"
        lines = [
            f"{self.slab}: {what} ({unit})",
            f"{'varied':10} {'thickness':>9} {'vacuum':>7} {'width':>6} {'atoms':>6} {'energy':>10} "
            f"{'change':>9}",
        ]
        for row in self.rows:
            head = f"{row.varied:10} {row.thickness:9.1f} {row.vacuum:7.1f} {row.width:6.1f} {row.atoms:6d}"
            if row.value is None or row.change is None:
                lines.append(f"{head}  {row.reason}")
            else:
                lines.append(f"{head} {row.value:10.{digits}f} {row.change:+9.{digits}f}")
        lines.append(
            "thickness, vacuum and width in Å; change: from the largest value of the same kind"
            + (f"; 1 eV/Å² is {J_M2:.2f} J/m²" if is_surface else "")
        )
        return "\n".join([*lines, *(f"WARNING: {notice}" for notice in self.notices)])


def convergence_table(
    bulk: Any,
    miller: str | Sequence[int],
    calculator: BaseCalculator,
    *,
    adsorbate: Adsorbate | None = None,
    termination: int | None = None,
    bulks: str | Path | None = None,
    thicknesses: Sequence[float] = THICKNESSES,
    vacuums: Sequence[float] = VACUUMS,
    widths: Sequence[float] = WIDTHS,
    energy_kind: str | None = None,
    progress: bool = False,
) -> Convergence:
    """Compute an energy for thicker slabs, more vacuum and wider cells, one at a time.

    Without an adsorbate it is the surface energy, (E(slab) - n E(bulk)) / 2A, the mean of the two sides. With
    one it is the adsorption energy of the first symmetry-distinct placement of the first slab, at the same
    site on all others. Nothing is relaxed: a row takes at most three energies.

    Args:
        bulk, miller, bulks: as in `slabs_of_bulk`; one plane.
        calculator: an ASE calculator; one of adsorption energies needs an adsorbate.
        adsorbate: as in `placements`.
        termination: its number; the first if None.
        thicknesses, vacuums, widths: Å at least; the others are OC20's (`THICKNESS`, `VACUUM`, `WIDTH`).
        energy_kind: as in `resolve_energy_kind`.
        progress: show a progress bar on standard error.

    Raises:
        InputError: a clean slab with a model of adsorption energies, and what `slabs_of_bulk` raises.
    """
    kind = resolve_energy_kind(calculator, energy_kind)
    if kind == "adsorption":
        refuse_dispersion(calculator, "a table of convergence")
    if kind == "adsorption" and adsorbate is None:
        raise InputError(f"{UNKNOWN}: give an adsorbate, or a calculator of total energies")
    if (isinstance(miller, str) and miller.strip().lower() == "all") or termination == "all":
        raise InputError("convergence is checked for one plane and one termination: give their numbers")
    wanted = {"thickness": thicknesses, "vacuum": vacuums, "width": widths}
    if not any(wanted.values()):
        raise InputError("no thickness, vacuum or width is given: give values in Å")
    found = find_bulk(bulk, bulks)
    base = {"thickness": THICKNESS, "vacuum": VACUUM, "width": WIDTH}
    settings = [
        (name, {**base, name: float(value)}) for name, values in wanted.items() for value in sorted(values)
    ]
    known: dict[tuple[float, float, float], tuple[int, float | None, str]] = {}
    rows, first = [], None
    energies = _Energies(calculator, kind, found)
    for name, sizes in tqdm(settings, desc="convergence", unit="slab", disable=not progress):
        key = sizes["thickness"], sizes["vacuum"], sizes["width"]
        if key not in known:
            (slab,) = slabs_of_bulk(found, miller, termination, **sizes)
            first = first or slab
            try:
                value = energies.surface(slab) if adsorbate is None else energies.adsorption(slab, adsorbate)
                known[key] = (len(slab.atoms), value, "")
            except InputError as error:
                known[key] = (len(slab.atoms), None, str(error))
        rows.append(ConvergenceRow(name, *key, *known[key]))
    assert first is not None
    return Convergence(
        SURFACE_ENERGY if adsorbate is None else ADSORPTION_ENERGY,
        first.report.origin,
        _Energies.formula(adsorbate),
        tuple(_Energies.with_changes(rows)),
        first.report.notices,
    )


@dataclass(frozen=True)
class _Energies:
    """Energies of unrelaxed structures with one calculator.

    Attributes:
        calculator: of the kind of energies that `kind` says.
        kind: "adsorption" or "total".
        bulk: what slabs are cut from.
        surroundings: of the site of the first slab (`_surroundings`); empty before.
    """

    calculator: BaseCalculator
    kind: str
    bulk: Bulk
    surroundings: dict[int, np.ndarray] = field(default_factory=dict)

    def surface(self, slab: CleanSlab) -> float:
        """Surface energy, eV/Å²."""
        cells = bulk_cells(slab)
        excess = unrelaxed_energy(slab.atoms, self.calculator) - cells * unrelaxed_energy(
            self.bulk.atoms, self.calculator
        )
        return excess / (2 * surface_area(slab.atoms))

    def adsorption(self, slab: CleanSlab, adsorbate: Adsorbate) -> float:
        """Adsorption energy at the site of the first slab, eV."""
        placement = self._placed(slab, adsorbate)
        energy = unrelaxed_energy(placement.atoms, self.calculator)
        if self.kind == "adsorption":
            return energy
        alone = placement.atoms[list(placement.molecules[0])]
        box = Atoms(alone.numbers, alone.positions)
        box.center(vacuum=_BOX)
        box.pbc = True
        return energy - unrelaxed_energy(slab.atoms, self.calculator) - unrelaxed_energy(box, self.calculator)

    def _placed(self, slab: CleanSlab, adsorbate: Adsorbate) -> Placement:
        """Place at the first distinct site of the first slab, and at the same one of all others.

        Which site is the first changes with the cell: that of a step with its thickness, for one.
        """
        if not self.surroundings:
            (first,) = placements(slab.atoms, adsorbate, "symmetry", 1)
            self.surroundings.update(_surroundings(slab.atoms, first))
            return first
        found = placements(slab.atoms, adsorbate, "symmetry")
        differences = [_difference(self.surroundings, _surroundings(slab.atoms, one)) for one in found]
        best = int(np.argmin(differences))
        if not differences[best] < _SAME_SITE:
            raise InputError("no site of this slab is like that of the first one")
        return found[best]

    @staticmethod
    def with_changes(rows: list[ConvergenceRow]) -> list[ConvergenceRow]:
        """Subtract from every value that of the largest slab of its kind."""
        last = {row.varied: row.value for row in rows if row.value is not None}
        return [
            ConvergenceRow(**{**vars(row), "change": row.value - float(last[row.varied] or 0.0)})
            if row.value is not None
            else row
            for row in rows
        ]

    @staticmethod
    def formula(adsorbate: Adsorbate | None) -> str:
        """Name or formula of an adsorbate, empty for none."""
        if adsorbate is None:
            return ""
        if isinstance(adsorbate, str):
            return adsorbate
        if isinstance(adsorbate, PathLike):
            return Path(adsorbate).name
        atoms = adsorbate if isinstance(adsorbate, Atoms) else adsorbate[0]
        return str(atoms.get_chemical_formula())


def _surroundings(slab: Atoms, placement: Placement) -> dict[int, np.ndarray]:
    """Distances from a site to the nearest atoms of a slab, Å, ascending, by atomic number."""
    marked = Atoms(
        [*slab.numbers, 0], [*slab.positions, placement.site.position], cell=slab.cell, pbc=slab.pbc
    )
    first, second, distances, vectors = neighbor_list("ijdD", marked, _AROUND)
    normal = np.cross(slab.cell[0], slab.cell[1])
    depths = -vectors @ (normal / np.linalg.norm(normal))  # a thin slab lacks what lies deeper
    of_site = (first == len(slab)) & (second != len(slab)) & (depths < _BELOW)
    numbers, distances = marked.numbers[second[of_site]], distances[of_site]
    return {int(kind): np.sort(distances[numbers == kind])[:_NEAREST] for kind in np.unique(numbers)}


def _difference(first: dict[int, np.ndarray], second: dict[int, np.ndarray]) -> float:
    """Largest difference between the distances around two sites, Å, as far as both slabs have atoms."""
    if first.keys() != second.keys():
        return float("inf")
    pairs = [(distances, second[kind]) for kind, distances in first.items()]
    return max(float(np.abs(one[: len(other)] - other[: len(one)]).max(initial=0.0)) for one, other in pairs)

"""Results of a coverage series: species and compositions, arrangements, the table and the picture."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from ase import Atoms

from equiformer2.adsorption.placements import Adsorbate, Placement
from equiformer2.adsorption.saddle_points import FALL
from equiformer2.errors import InputError
from equiformer2.inference.many import Relaxation
from equiformer2.inference.pictures import new_figure, png_bytes

Composition = tuple[int, ...]
"""Number of molecules of every species in the cell, in the order of the species."""

DEFAULT_COUNTS = (1, 2, 3, 4)
"""Numbers of molecules of a single species, as many of them as fit."""

DEFAULT_MIXED_COUNTS = (1, 2)
"""Numbers of all molecules together of several species, in every composition that fits."""

_MOST_MOLECULES = 100
_MOST_COMPOSITIONS = 200


@dataclass(frozen=True)
class Species:
    """Names of the species of a series, by which compositions are told.

    Attributes:
        names: one per species.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, adsorbates: Sequence[Adsorbate], molecules: Sequence[Atoms]) -> "Species":
        """Name adsorbates as they were given, those of files by the file, and structures by their formula.

        Raises:
            InputError: two of one name.
        """
        names: list[str] = []
        for adsorbate, molecule in zip(adsorbates, molecules, strict=True):
            if isinstance(adsorbate, str | PathLike):
                name = Path(adsorbate).stem
            elif (name := molecule.get_chemical_formula()) in names:  # an isomer
                name = f"{name} #{1 + sum(other.split(' #')[0] == name for other in names)}"
            if name.lstrip("*") in (other.lstrip("*") for other in names):
                raise InputError(f"the adsorbate {name} is given twice: give its number of molecules instead")
            names.append(name)
        return cls(tuple(names))

    @property
    def mixed(self) -> bool:
        """True for several species."""
        return len(self.names) > 1

    def compositions(self, counts: Sequence[int | Sequence[int]] | None) -> list[Composition]:
        """Compositions that are asked for, those of fewer molecules first.

        Args:
            counts: numbers of molecules, or compositions. A number stands for all compositions of as many
                molecules; None for the default ones.

        Raises:
            InputError: no numbers, or not one per species.
        """
        wanted = (DEFAULT_MIXED_COUNTS if self.mixed else DEFAULT_COUNTS) if counts is None else list(counts)
        found: set[Composition] = set()
        impossible = f"the numbers of molecules {list(wanted)} must be whole, from 1 to {_MOST_MOLECULES}"
        for count in wanted:
            several = isinstance(count, Iterable) and not isinstance(count, str)
            numbers: tuple[Any, ...] = tuple(count) if isinstance(count, Iterable) and several else (count,)
            whole = [number for number in range(_MOST_MOLECULES + 1) if number in numbers]
            if any(number not in whole for number in numbers):
                raise InputError(impossible)
            numbers = tuple(map(int, numbers))
            if not 1 <= sum(numbers) <= _MOST_MOLECULES:
                raise InputError(impossible)
            if not several and self.mixed:
                found |= set(self._of_total(numbers[0]))
                continue
            if len(numbers) != len(self.names):
                raise InputError(
                    f"{','.join(map(str, numbers))} has numbers for {len(numbers)} adsorbates, and there are "
                    f"{len(self.names)} ({', '.join(self.names)}): give one number for each"
                )
            found.add(numbers)
        if not found:
            raise InputError(impossible)
        if len(found) > _MOST_COMPOSITIONS:
            raise InputError(
                f"these numbers of molecules have {len(found)} compositions, and a series has "
                f"{_MOST_COMPOSITIONS} at most: give compositions such as {','.join('1' for _ in self.names)}"
            )
        return sorted(found, key=lambda numbers: (sum(numbers), [-number for number in numbers]))

    def _of_total(self, total: int) -> list[Composition]:
        """All compositions of as many molecules, `_MOST_COMPOSITIONS` + 1 of them at most."""
        cuts = itertools.combinations(range(total + len(self.names) - 1), len(self.names) - 1)
        return [
            tuple(last - first - 1 for first, last in pairwise((-1, *bars, total + len(self.names) - 1)))
            for bars in itertools.islice(cuts, _MOST_COMPOSITIONS + 1)
        ]

    @staticmethod
    def differences(
        totals: Mapping[Composition, float | None],
    ) -> dict[Composition, tuple[tuple[float | None, ...], tuple[Composition | None, ...], float | None]]:
        """Differences between the total energies of compositions.

        Args:
            totals: adsorption energies of all molecules together, eV, that of the clean slab (0) among them.

        Returns:
            For every composition `differentials`, `differentials_from` and `interaction` of `CoverageRow`.
        """
        found = {}
        for composition, total in totals.items():
            differentials: list[float | None] = []
            sources: list[Composition | None] = []
            for place, number in enumerate(composition):

                def others(one: Composition, place: int = place) -> Composition:
                    return (*one[:place], *one[place + 1 :])

                fewer = [one for one in totals if one[place] < number and others(one) == others(composition)]
                before = max(fewer, key=lambda one: one[place], default=None)
                lower = None if before is None else totals[before]
                sources.append(before)
                differentials.append(
                    None
                    if total is None or lower is None or before is None
                    else (total - lower) / (number - before[place])
                )
            alone = [
                totals.get(tuple(number if other == place else 0 for other in range(len(composition))))
                for place, number in enumerate(composition)
                if number
            ]
            values = [value for value in alone if value is not None]
            interaction = None
            if total is not None and len(alone) > 1 and len(values) == len(alone):
                interaction = total - sum(values)
            found[composition] = tuple(differentials), tuple(sources), interaction
        return found

    @staticmethod
    def label(composition: Composition) -> str:
        """Name of a composition in names of files, such as `n02` or `n02_01`."""
        return "n" + "_".join(f"{number:02d}" for number in composition)

    def text(self, composition: Composition) -> str:
        """Composition in words, such as `2` or `2 *CO + 1 *O`."""
        if not self.mixed:
            return str(composition[0])
        told = [f"{number} {name}" for number, name in zip(composition, self.names, strict=True) if number]
        return " + ".join(told)

    def gas_term(self, name: str) -> str:
        """Key under which the energy of a molecule by itself is among the terms of a series."""
        return f"gas_per_molecule {name}" if self.mixed else "gas_per_molecule"

    def gas_energy(self, numbers: Mapping[str, int], terms: Mapping[str, float]) -> float:
        """Energy of so many molecules by themselves, eV, from the terms of a series."""
        return sum(number * terms.get(self.gas_term(name), 0.0) for name, number in numbers.items())

    def by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        """Values of every species by its name."""
        return dict(zip(self.names, values, strict=True))


@dataclass
class Arrangement:
    """One arrangement of several molecules and what became of it.

    Attributes:
        id: its name, the numbers of molecules first.
        composition: number of molecules of every species.
        placement: start, with the atoms of every molecule.
        status: `converged`, `unconverged`, `merged` (a copy of `merged_into` by symmetry), `anomalous` or
            `failed`.
        merged_into: id of the arrangement that it is a copy of.
        relaxation: that which its energy is of; None for a copy.
        saddle: its own relaxation where that has ended on a saddle point; `relaxation` is then the one that
            has left it.
        anomalies: sentences, each with the molecule that it is about.
    """

    id: str
    composition: Composition
    placement: Placement
    status: str = "failed"
    merged_into: str | None = None
    relaxation: Relaxation | None = None
    saddle: Relaxation | None = None
    anomalies: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of molecules."""
        return sum(self.composition)

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        done, own = self.relaxation, self.saddle or self.relaxation
        return {
            "id": self.id,
            "molecules": self.count,
            "status": self.status,
            "merged_into": self.merged_into,
            "steps": None if own is None else own.steps,
            "model_energy_eV": None if done is None else done.energy_eV,
            "max_force_eV_A": None if done is None else done.max_force_eV_A,
            "model_evaluations": 0 if own is None else own.model_evaluations,
            "checked_by": None if done is None or self.saddle is None else done.id,
            "saddle_model_energy_eV": None if self.saddle is None else self.saddle.energy_eV,
            "anomalies": self.anomalies,
            "reason": None if done is None else done.reason,
        }


@dataclass(frozen=True)
class CoverageRow:
    """The lowest arrangement of one composition.

    Attributes:
        composition: number of molecules of every species.
        coverage: molecules per surface atom.
        total: adsorption energy of all molecules together, eV; None where it is not defined.
        average: the same per molecule, eV.
        differentials: by species, change per molecule of it that is added to the composition before, eV; None
            where that one is not known or has no energy.
        differentials_from: by species, the composition before: as many of the other species, and the largest
            smaller number of this one (0 for none). None where the series has none, or the species is absent.
        interaction: energy of a mixture less those of its species by themselves in the same numbers, eV; None
            for a single species or where these have no energy.
        best: the lowest arrangement; None without one.
        statuses: number of arrangements by status.
        reason: sentence for a missing energy.
    """

    composition: Composition
    coverage: float
    total: float | None
    average: float | None
    differentials: tuple[float | None, ...]
    differentials_from: tuple[Composition | None, ...]
    interaction: float | None
    best: Arrangement | None
    statuses: dict[str, int]
    reason: str = ""

    @property
    def count(self) -> int:
        """Number of molecules."""
        return sum(self.composition)

    @property
    def differential(self) -> float | None:
        """Differential energy of a series of one species, eV; None for others."""
        return self.differentials[0] if len(self.composition) == 1 else None

    @property
    def differential_from(self) -> int | None:
        """Number of molecules before, of a series of one species; None for others."""
        before = self.differentials_from[0]
        return before[0] if before is not None and len(before) == 1 else None

    @property
    def converged(self) -> bool:
        """True if the lowest arrangement has converged."""
        return self.best is not None and self.best.status == "converged"

    def summary(self, area: float, species: Species) -> dict[str, Any]:
        """Plain values for a JSON record.

        Args:
            area: of the surface, Å².
            species: of the series.
        """
        best = self.best
        mixture: dict[str, Any] = {
            "differential_adsorption_energy_eV": self.differential,
            "differential_from_molecules": self.differential_from,
        }
        if species.mixed:
            before = [None if one is None else species.by_name(one) for one in self.differentials_from]
            mixture = {
                "differential_adsorption_energies_eV": species.by_name(self.differentials),
                "differential_from": species.by_name(before),
                "interaction_energy_eV": self.interaction,
            }
        return {
            "molecules": self.count,
            "composition": species.by_name(self.composition),
            "coverage_per_surface_atom": self.coverage,
            "coverage_per_A2": self.count / area,
            "total_adsorption_energy_eV": self.total,
            "average_adsorption_energy_eV": self.average,
            **mixture,
            "converged": self.converged,
            "best": None if best is None else best.id,
            "file": None if best is None else f"{species.label(self.composition)}.extxyz",
            "statuses": self.statuses,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class CoverageSeries:
    """Adsorption energies over coverage.

    Attributes:
        rows: one per composition, those of fewer molecules first.
        energy_kind: of the model.
        surface_atoms: number of atoms seen from above in one cell, by which coverage is counted.
        notices: sentences that users should read.
        record: content of `coverage.json`.
        species: that compositions are of.
    """

    rows: tuple[CoverageRow, ...]
    energy_kind: str
    surface_atoms: int
    notices: tuple[str, ...]
    record: dict[str, Any]
    species: Species

    @property
    def converged(self) -> bool:
        """True if everything that an energy rests on has converged."""
        return bool(self.record["converged"])

    def __str__(self) -> str:
        def shown(value: float | None) -> str:
            return "-" if value is None else f"{value:.4f}"

        names = [f"{'differential':>13}"]
        if self.species.mixed:
            names = [f"{f'add {name}':>13}" for name in self.species.names] + [f"{'interaction':>12}"]
        told = [self.species.text(row.composition) for row in self.rows]
        width = max([9, *map(len, told)])
        lines = [
            f"coverage in molecules per surface atom ({self.surface_atoms} in the cell); energies in eV",
            f"{'molecules':>{width}} {'coverage':>9} {'total':>10} {'average':>10} {' '.join(names)}  lowest",
        ]
        for row, text in zip(self.rows, told, strict=True):
            more = [*row.differentials, *([row.interaction] if self.species.mixed else [])]
            cells = [f"{shown(row.total):>10}", f"{shown(row.average):>10}"]
            cells += [f"{shown(value):>{len(name)}}" for value, name in zip(more, names, strict=True)]
            said = row.reason or ("" if row.best is None else row.best.id)
            said += "" if row.converged or row.best is None else ", NOT converged"
            lines.append(f"{text:>{width}} {row.coverage:9.3f} {' '.join(cells)}  {said}")
        return "\n".join(lines)


def attraction_notices(rows: Sequence[CoverageRow], species: Species) -> list[str]:
    """Say where molecules are bound more strongly beside others than by themselves.

    Adsorbates mostly repel each other, so that the average energy of a species rises with coverage, and a
    mixture lies above its species by themselves.

    Args:
        rows: of a series, those of fewer molecules first.
        species: of the series.
    """
    sentences = []
    for place, name in enumerate(species.names):
        known = [
            (row.count, row.average)
            for row in rows
            if row.average is not None and row.composition[place] == row.count
        ]
        of = f" of {name}" if species.mixed else ""
        for (fewer, higher), (count, lower) in pairwise(known):
            if lower < higher - FALL:
                sentences.append(
                    f"the average adsorption energy{of} falls from {higher:.3f} eV with {fewer} in the cell "
                    f"to {lower:.3f} eV with {count}: either the molecules attract each other, or it is an "
                    f"artefact, of a lower arrangement of {fewer} that was not found (more --placements) or "
                    "of a model that does not know such coverages; look at the structures before using it"
                )
    for row in rows:
        if row.interaction is not None and row.interaction < -FALL * row.count:
            sentences.append(
                f"{species.text(row.composition)} lies {-row.interaction:.3f} eV below its species by "
                "themselves in the same numbers: either they attract each other, or it is an artefact, of "
                "lower arrangements of these that were not found (more --placements) or of a model that does "
                "not know such coverages; look at the structures before using it"
            )
    return sentences


def coverage_picture(rows: Sequence[CoverageRow], species: Species, title: str) -> bytes:
    """Draw average and differential adsorption energies against coverage, or by composition, as PNG."""
    figure = new_figure(6.4, 4.2)
    axis = figure.subplots()
    markers = (("#1f4e79", "o"), ("#a33c1f", "s"), ("#3f7f3a", "^"), ("#7a4f9e", "D"), ("#8a6d1d", "v"))
    lines: list[tuple[str, list[float | None]]] = [("average", [row.average for row in rows])]
    places = [row.coverage for row in rows]
    if species.mixed:
        places = [float(place) for place in range(len(rows))]
        for place, name in enumerate(species.names):
            lines.append((f"differential, {name}", [row.differentials[place] for row in rows]))
        axis.set_xticks(places, [species.text(row.composition) for row in rows], rotation=30, ha="right")
    else:
        lines.append(("differential", [row.differential for row in rows]))
        axis.set_xlabel("coverage (molecules per surface atom)")
    for (name, values), (colour, marker) in zip(lines, itertools.cycle(markers)):
        points = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        if points:
            style = marker if species.mixed else f"{marker}-"
            axis.plot(*zip(*points, strict=True), style, color=colour, label=name)
    axis.set_ylabel("adsorption energy (eV per molecule)")
    axis.set_title(f"{title}: lowest arrangement of each {'composition' if species.mixed else 'coverage'}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return png_bytes(figure)

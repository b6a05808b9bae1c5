"""Adsorption energies over coverage: one, two, three and more molecules on one slab.

E_n = E(slab with n molecules) - E(slab) - n E(molecule) of the lowest arrangement of n molecules gives the
average energy E_n / n and the differential energy, by which one molecule more changes it. All differences are
between total energies of one calculator.
"""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.data import covalent_radii
from ase.geometry import get_distances
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.anomalies import SKIN, check_anomalies
from equiformer2.adsorption.cards import CLEAN, card_structure, label_physics
from equiformer2.adsorption.named_structures import free_side_up
from equiformer2.adsorption.placements import Adsorbate, Placement, coverage_placements
from equiformer2.adsorption.references import check_gas_references, gas_reference, refuse_gas_references
from equiformer2.adsorption.saddle_points import (
    DISPLACEMENT,
    FALL,
    SaddleCheck,
    check_settings,
    displaced,
    status_of_check,
)
from equiformer2.adsorption.search_folder import CARD, CLEAN_SLAB, is_search, refuse_other_settings
from equiformer2.adsorption.slabs import find_slab
from equiformer2.adsorption.surface_energy import surface_area
from equiformer2.adsorption.surface_sites import open_atoms
from equiformer2.adsorption.symmetry import merge_copies, surface_symmetry
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_bytes, write_json
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.calculator import EquiformerV2Calculator
from equiformer2.inference.engines import calculator_identity, open_engine
from equiformer2.inference.many import Relaxation
from equiformer2.inference.named_calculators import resolve_energy_kind
from equiformer2.inference.pictures import new_figure, png_bytes
from equiformer2.inference.record import model_record, write_structure
from equiformer2.inference.relaxation_store import RelaxationStore
from equiformer2.script import header

logger = logging.getLogger(__name__)

COVERAGE = "coverage.json"
"""Record of a finished series, in its folder."""

DEFAULT_COUNTS = (1, 2, 3, 4)
"""Numbers of molecules, as many of them as fit."""

_MOST_MOLECULES = 100
_PICTURE = "coverage.png"


@dataclass(frozen=True)
class CoverageSettings:
    """Settings of a coverage series.

    Attributes:
        placements: number of arrangements per number of molecules, copies by symmetry included.
        seed: random seed of the arrangements.
        min_distance: Å between atoms of different molecules at the start.
        fmax: eV/Å; a relaxation has converged when no force on a free atom reaches it.
        steps: most steps of a relaxation.
        gas: source of the energy of the molecule by itself (`references.gas_reference`).
        gas_per_atom: eV per atom, instead of it.
        check_minima: number of the lowest arrangements of every number of molecules that are displaced and
            relaxed again, since they may be saddle points; 0 for none.

    Raises:
        InputError: a number of minima below 0.
    """

    placements: int = 8
    seed: int = 0
    min_distance: float = 2.5
    fmax: float = 0.05
    steps: int = 300
    gas: str = "vacuum"
    gas_per_atom: Mapping[str, float] = field(default_factory=dict)
    check_minima: int = 1

    def __post_init__(self) -> None:
        if self.check_minima < 0:
            raise InputError(f"check_minima is {self.check_minima}: give 0 or more")

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {
            "placements": self.placements,
            "seed": self.seed,
            "min_distance_A": self.min_distance,
            "fmax_eV_A": self.fmax,
            "steps": self.steps,
            "gas": self.gas,
            "gas_eV_per_atom": dict(self.gas_per_atom),
            "check_minima": self.check_minima,
        }


@dataclass
class Arrangement:
    """One arrangement of several molecules and what became of it.

    Attributes:
        id: its name, the number of molecules first.
        count: number of molecules.
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
    count: int
    placement: Placement
    status: str = "failed"
    merged_into: str | None = None
    relaxation: Relaxation | None = None
    saddle: Relaxation | None = None
    anomalies: list[str] = field(default_factory=list)

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
    """The lowest arrangement of one number of molecules.

    Attributes:
        count: number of molecules.
        coverage: molecules per surface atom.
        total: adsorption energy of all molecules together, eV; None where it is not defined.
        average: the same per molecule, eV.
        differential: change per molecule added to the count before, eV; None where that one has no energy.
        differential_from: the count before; 0 for the clean slab.
        best: the lowest arrangement; None without one.
        statuses: number of arrangements by status.
        reason: sentence for a missing energy.
    """

    count: int
    coverage: float
    total: float | None
    average: float | None
    differential: float | None
    differential_from: int
    best: Arrangement | None
    statuses: dict[str, int]
    reason: str = ""

    @property
    def converged(self) -> bool:
        """True if the lowest arrangement has converged."""
        return self.best is not None and self.best.status == "converged"

    def summary(self, area: float) -> dict[str, Any]:
        """Plain values for a JSON record.

        Args:
            area: of the surface, Å².
        """
        best = self.best
        return {
            "molecules": self.count,
            "coverage_per_surface_atom": self.coverage,
            "coverage_per_A2": self.count / area,
            "total_adsorption_energy_eV": self.total,
            "average_adsorption_energy_eV": self.average,
            "differential_adsorption_energy_eV": self.differential,
            "differential_from_molecules": self.differential_from,
            "converged": self.converged,
            "best": None if best is None else best.id,
            "file": None if best is None else _file(self.count),
            "statuses": self.statuses,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class CoverageSeries:
    """Adsorption energies over coverage.

    Attributes:
        rows: one per number of molecules, ascending.
        energy_kind: of the model.
        surface_atoms: number of atoms seen from above in one cell, by which coverage is counted.
        notices: sentences that users should read.
        record: content of `coverage.json`.
    """

    rows: tuple[CoverageRow, ...]
    energy_kind: str
    surface_atoms: int
    notices: tuple[str, ...]
    record: dict[str, Any]

    @property
    def converged(self) -> bool:
        """True if everything that an energy rests on has converged."""
        return bool(self.record["converged"])

    def __str__(self) -> str:
        lines = [
            f"coverage in molecules per surface atom ({self.surface_atoms} in the cell); energies in eV",
            f"{'molecules':>9} {'coverage':>9} {'total':>10} {'average':>10} {'differential':>13}  lowest",
        ]
        for row in self.rows:
            values = (row.total, row.average, row.differential)
            cells = ["-" if value is None else f"{value:.4f}" for value in values]
            told = row.reason or ("" if row.best is None else row.best.id)
            told += "" if row.converged or row.best is None else ", NOT converged"
            lines.append(
                f"{row.count:9d} {row.coverage:9.3f} {cells[0]:>10} {cells[1]:>10} {cells[2]:>13}  {told}"
            )
        return "\n".join(lines)


def coverage_series(
    slab: Any,
    adsorbate: Adsorbate,
    calculator: BaseCalculator,
    counts: Sequence[int] | None = None,
    settings: CoverageSettings | None = None,
    *,
    out: AnyPath | None = None,
    overwrite: bool = False,
    energy_kind: str | None = None,
    describe: Callable[[list[Atoms]], dict[str, Any]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> CoverageSeries:
    """Relax arrangements of several molecules on one slab, and compare the lowest of every number.

    An arrangement does not count if a molecule has an anomaly, or if two molecules have bound to each other.
    A model of adsorption energies has one mean per structure, so that only the energy of a single molecule is
    defined: structures are relaxed and the lowest of every number is found, but the other energies are None,
    and a notice says so.

    Args:
        slab: clean slab, as `find_slab` takes it: held atoms stay held, and without one OC20's are.
        adsorbate: name, file, or structure, as in `placements`.
        calculator: any ASE calculator.
        counts: numbers of molecules; None for 1 to 4, as many as fit.
        settings: of arrangements, relaxations and references.
        out: folder for all files; the same call continues a stopped series, and gives the result of a
            finished one without writing anything. None keeps nothing.
        overwrite: write the results of a finished series again; finished relaxations are kept.
        energy_kind: as in `resolve_energy_kind`.
        describe: gives plain values about the model for the record, from structures.
        notes: plain values about how the slab was made, for the record.

    Raises:
        InputError: counts that mean nothing or do not fit, a folder of another series, and what placements
            and model refuse.
    """
    settings = settings or CoverageSettings()
    clean = find_slab(slab)
    series = _Series(clean.atoms, adsorbate, calculator, settings, energy_kind)
    series.arrange(counts)
    finished: dict[str, Any] | None = None
    with ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(out)
            check_target(folder, is_folder=True)
            if is_search(folder):
                raise InputError(f"{folder} holds a search, and no coverage series: give another folder")
            if (folder / COVERAGE).exists() and not overwrite:
                finished = read_json(folder / COVERAGE)
                series.check_same_settings(folder, finished)
        series.relax(folder)
        rows = tuple(series.rows())
        series.notices += attraction_notices(rows)
        if finished is not None and series.is_result(folder, finished, rows):
            logger.info(f"{folder} holds this series, finished: its result is given, and nothing is written")
            notices = tuple(finished["notices"])
            return CoverageSeries(rows, series.kind, series.surface_atoms, notices, finished)
        return series.write(
            folder, rows, describe or series.description, {"slab": clean.report.summary(), **(notes or {})}
        )


class _Series:
    """One series; arguments as of `coverage_series`."""

    def __init__(
        self,
        slab: Atoms,
        adsorbate: Adsorbate,
        calculator: BaseCalculator,
        settings: CoverageSettings,
        energy_kind: str | None,
    ) -> None:
        self.slab, self.adsorbate, self.calculator, self.settings = slab, adsorbate, calculator, settings
        self.relaxation = RelaxationSettings(fmax=settings.fmax, steps=settings.steps)
        self.engine = open_engine(calculator)
        self.kind = resolve_energy_kind(calculator, energy_kind)
        self.cutoff = None
        if isinstance(calculator, EquiformerV2Calculator):
            self.cutoff = calculator.predictor.checkpoint.config.max_radius
        self.surface_atoms = len(open_atoms(free_side_up(slab)[0].atoms))
        self.area = surface_area(slab)
        self.arrangements: dict[int, list[Arrangement]] = {}
        self.notices: list[str] = []
        self.terms: dict[str, float] = {}
        self.gas: dict[str, Any] | None = None
        self.clean: Relaxation | None = None
        self.checks: list[SaddleCheck] = []

    def arrange(self, counts: Sequence[int] | None) -> None:
        """Place the molecules, and mark arrangements that are copies by symmetry."""
        wanted = DEFAULT_COUNTS if counts is None else self._checked(counts)
        symmetry = surface_symmetry(self.slab)
        for count in wanted:
            try:
                placed = coverage_placements(
                    self.slab,
                    [self.adsorbate] * count,
                    self.settings.placements,
                    self.settings.seed,
                    min_distance=self.settings.min_distance,
                    cutoff=self.cutoff,
                )
            except InputError as error:
                if counts is not None or count == 1:
                    raise InputError(f"{count} of the adsorbate: {error}") from error
                self.notices.append(f"{count} molecules do not fit, and the series ends before them: {error}")
                break
            found = [Arrangement(f"n{count:02d}-{one.id}", count, one) for one in placed]
            adsorbates = [one.placement.atoms[len(self.slab) :] for one in found]
            for one, first in zip(found, merge_copies(adsorbates, symmetry), strict=True):
                if found[first] is not one:
                    one.status, one.merged_into = "merged", found[first].id
            self.arrangements[count] = found
        if self.kind == "total":
            check_gas_references(self._molecule(), self.settings.gas_per_atom, self.settings.gas)
        else:
            refuse_gas_references(self.settings.gas_per_atom, self.settings.gas)
        if self.kind != "total" and max(self.arrangements) > 1:
            self.notices.append(
                "a model of adsorption energies has one mean per structure, whatever the number of "
                "molecules, so that total, average and differential energies of several molecules are not "
                "defined: they are left out, and only structures are compared; give a calculator of total "
                "energies"
            )

    def check_same_settings(self, folder: Path, finished: Mapping[str, Any]) -> None:
        """Raise `InputError` where a finished series was made with other settings than this one."""
        before = finished.get("settings") or {}
        now = json.loads(json.dumps(self.settings.summary()))
        names = [name for name in now if before.get(name) != now[name]]
        if [row.get("molecules") for row in finished.get("coverages") or []] != sorted(self.arrangements):
            names.append("counts")
        refuse_other_settings(folder, names, "series")

    def is_result(self, folder: Path, finished: Mapping[str, Any], rows: Sequence[CoverageRow]) -> bool:
        """Tell whether the files of a finished series are all there and say what its rows say."""
        now = json.loads(json.dumps([row.summary(self.area) for row in rows]))
        return bool(finished["coverages"] == now) and all(
            (folder / name).exists() for name in finished["files"]
        )

    def relax(self, folder: Path) -> None:
        """Relax the clean slab and all arrangements; those of an earlier run are read."""
        identity = {
            "model": self.engine.identity(),
            "adsorbate": self._molecule().get_chemical_formula(),
            "seed": self.settings.seed,
            "min_distance_A": self.settings.min_distance,
            "gas": self.settings.gas,
            "gas_per_atom": dict(self.settings.gas_per_atom),
            "fmax_eV_A": self.settings.fmax,
            "steps": self.settings.steps,
        }
        everything = [one for found in self.arrangements.values() for one in found]
        waiting = {one.id: one for one in everything if one.merged_into is None}
        with RelaxationStore(folder, {"coverage": True, **identity}) as store:
            # A model of adsorption energies has none for it; its geometry is what anomalies are found by.
            self.engine.energies_matter = self.kind == "total"
            (clean,) = self._relaxed(store, [(CLEAN, self.slab)])
            self.engine.energies_matter = True
            if clean.status == "failed" or clean.energy_eV is None:
                raise InputError(f"the clean slab cannot be relaxed: {clean.reason}")
            self.clean = clean
            if not clean.converged:
                self.notices.append(f"the clean slab has not converged in {self.settings.steps} steps")
            if self.kind == "total":
                self._refer(folder, clean)
            starts = [(name, one.placement.atoms) for name, one in waiting.items()]
            bar = tqdm(total=len(starts), desc="relaxing", unit="arrangement", disable=None, leave=False)
            for relaxation in self._relaxed(store, starts):
                self._judge(waiting[relaxation.id], relaxation)
                bar.update()
            bar.close()
            for found in self.arrangements.values():
                self._check_lowest(store, found)

    def rows(self) -> Iterator[CoverageRow]:
        """Give the lowest arrangement of every number of molecules, and its energies."""
        before, lower = 0, 0.0 if self.kind == "total" else None
        for count, found in sorted(self.arrangements.items()):
            best = self._lowest(found)
            statuses = dict(Counter(one.status for one in found))
            total = None if best is None else self._total(best)
            reason = ""
            if best is None:
                listed = ", ".join(f"{number} {status}" for status, number in statuses.items())
                reason = f"no arrangement has kept its molecules ({listed})"
            elif total is None:
                reason = "not defined for a model of adsorption energies"
            differential = None if total is None or lower is None else (total - lower) / (count - before)
            if total is not None and self.kind == "adsorption":
                differential = total
            yield CoverageRow(
                count,
                count / self.surface_atoms,
                total,
                None if total is None else total / count,
                differential,
                before,
                best,
                statuses,
                reason,
            )
            before, lower = count, total

    def write(
        self,
        folder: Path,
        rows: tuple[CoverageRow, ...],
        describe: Callable[[list[Atoms]], dict[str, Any]],
        notes: Mapping[str, Any],
    ) -> CoverageSeries:
        """Write structures, picture and, last, the record."""
        assert self.clean is not None
        structures = {CLEAN_SLAB: self.clean.atoms}
        for row in rows:
            if row.best is not None and row.best.relaxation is not None:
                structures[_file(row.count)] = row.best.relaxation.atoms
        for name, atoms in structures.items():
            write_structure(folder / name, atoms)
        files = [*structures, "trajectories"]
        if any(row.total is not None for row in rows):
            write_bytes(folder / _PICTURE, coverage_picture(rows, self._molecule().get_chemical_formula()))
            files.append(_PICTURE)
        model = describe(list(structures.values())[1:])
        everything = [one.summary() for found in self.arrangements.values() for one in found]
        checks = [check.summary() for check in self.checks]
        files += [CARD]
        record = {
            **header("adsorption-coverage/1", model.get("checkpoint")),
            "adsorbate": self._molecule().get_chemical_formula(),
            "energy_kind": self.kind,
            "converged": all(row.converged for row in rows)
            and (self.gas is None or (self.clean.converged and self.gas["converged"])),
            "surface_atoms": self.surface_atoms,
            "area_A2": self.area,
            "coverages": [row.summary(self.area) for row in rows],
            "arrangements": everything,
            "saddle_check": {"displacement_A": DISPLACEMENT, "tolerance_eV": FALL, "checks": checks},
            "model_evaluations": self.clean.model_evaluations
            + sum(row["model_evaluations"] for row in [*everything, *checks]),
            "terms_eV": self.terms,
            "gas": self.gas,
            "clean_slab": {"converged": self.clean.converged, "max_force_eV_A": self.clean.max_force_eV_A},
            "notices": self.notices,
            "model": dict(model),
            "settings": {**self.settings.summary(), **notes},
            "files": files,
        }
        write_json(folder / CARD, self._card(folder, rows, record))
        write_json(folder / COVERAGE, record)
        return CoverageSeries(rows, self.kind, self.surface_atoms, tuple(self.notices), record)

    def description(self, structures: list[Atoms]) -> dict[str, Any]:
        """Plain values about a calculator that was given in Python."""
        if isinstance(self.calculator, EquiformerV2Calculator):
            return {**model_record(self.calculator.predictor, "", structures), "checkpoint": None}
        return {"checkpoint": None, **calculator_identity(self.calculator), "energy_kind": self.kind}

    def _checked(self, counts: Sequence[int]) -> list[int]:
        whole = [count for count in range(1, _MOST_MOLECULES + 1) if count in counts]
        if not whole or any(count not in whole for count in counts):
            raise InputError(
                f"the numbers of molecules {list(counts)} must be whole, from 1 to {_MOST_MOLECULES}"
            )
        return whole

    def _molecule(self) -> Atoms:
        """Atoms of one molecule, in the cell of the slab."""
        one = next(iter(self.arrangements.values()))[0].placement
        return one.atoms[list(one.molecules[0])]

    def _relaxed(self, store: RelaxationStore, starts: Sequence[tuple[str, Atoms]]) -> Iterator[Relaxation]:
        yield from store.relax(starts, self.engine, self.relaxation)

    def _refer(self, folder: Path, clean: Relaxation) -> None:
        """Find the energies of clean slab and molecule; the molecule's is kept in the folder."""
        file = folder / "gas.json"
        if not file.exists():
            relaxing = {"optimizer": "LBFGS", "fmax": self.settings.fmax, "steps": self.settings.steps}
            gas = gas_reference(
                self._molecule(), self.calculator, self.settings.gas_per_atom, self.settings.gas, relaxing
            )
            write_json(file, gas.summary() | {"per_atom_eV": gas.per_atom, "converged": gas.converged})
        self.gas = read_json(file)
        self.terms = {"slab": float(clean.energy_eV or 0.0), "gas_per_molecule": float(self.gas["energy_eV"])}
        if not self.gas["converged"]:
            self.notices.append("the molecule by itself has not converged")

    def _card(self, folder: Path, rows: Sequence[CoverageRow], record: Mapping[str, Any]) -> dict[str, Any]:
        """Trust card of the series."""
        assert self.clean is not None
        structures = []
        if self.kind == "total":  # a model of adsorption energies has none for it
            structures = [card_structure(CLEAN, self.clean.atoms, folder / CLEAN_SLAB)]
        chosen = [row.best for row in rows if row.best is not None and row.best.relaxation is not None]
        best = {one.count: one.relaxation.atoms for one in chosen if one.relaxation is not None}
        structures += [
            card_structure(f"n{count:02d}", atoms, folder / _file(count)) for count, atoms in best.items()
        ]
        provenance = None
        if isinstance(self.calculator, EquiformerV2Calculator):
            provenance = self.calculator.predictor.checkpoint.provenance
        largest = list(best.values())[-1] if best else self.clean.atoms
        kept = ("adsorbate", "energy_kind", "converged", "coverages", "terms_eV", "gas", "saddle_check")
        return {
            **header("adsorption-coverage-card/1", record["model"].get("checkpoint")),
            **{name: record[name] for name in kept},
            "label_physics": label_physics(largest, self.kind, provenance),
            "notices": self.notices,
            "model": record["model"],
            "settings": record["settings"],
            "structures": structures,
        }

    def _check_lowest(self, store: RelaxationStore, found: Sequence[Arrangement]) -> None:
        """Displace the lowest arrangements of one number and relax them again, until they stay."""
        checked: set[str] = set()
        while True:
            known = [one for one in found if one.status == "converged" and one.relaxation is not None]
            known.sort(key=lambda one: self._energy(one.count, one.relaxation) or 0.0)
            one = next((one for one in known[: self.settings.check_minima] if one.id not in checked), None)
            if one is None:
                return
            checked.add(one.id)
            self._check(store, one)

    def _check(self, store: RelaxationStore, one: Arrangement) -> None:
        """Displace the molecules of an arrangement, each by itself, and relax it again."""
        assert one.relaxation is not None
        start = displaced(one.relaxation.atoms, one.id, self.settings.seed, one.placement.molecules)
        settings = check_settings(self.settings.fmax, self.settings.steps)
        (relaxation,) = store.relax([(f"{one.id}.check", start)], self.engine, settings)
        trial = Arrangement(one.id, one.count, one.placement)
        self._judge(trial, relaxation)
        before, after = self._energy(one.count, one.relaxation), self._energy(one.count, relaxation)
        status = status_of_check(trial.status, relaxation, self.settings.fmax)
        check = SaddleCheck(one.id, relaxation, float(before or 0.0), after, status)
        self.checks.append(check)
        if check.fell:
            logger.info(check.sentence)
            one.saddle, one.relaxation = one.relaxation, relaxation
        elif not check.stays:
            because = f" ({trial.anomalies[0]})" if trial.anomalies else ""
            self.notices.append(f"{check.sentence}{because}")

    def _energy(self, count: int, relaxation: Relaxation | None) -> float | None:
        """Energy of a relaxation: of all molecules, or the model's own where that is not defined, eV."""
        if relaxation is None or relaxation.energy_eV is None:
            return None
        gas = count * self.terms.get("gas_per_molecule", 0.0)
        return float(relaxation.energy_eV) - self.terms.get("slab", 0.0) - gas

    def _judge(self, one: Arrangement, relaxation: Relaxation) -> None:
        """Note what became of an arrangement."""
        one.relaxation, one.status = relaxation, relaxation.status
        if relaxation.status == "stopped":  # by the spread of a committee
            one.status = "unconverged"
        if relaxation.energy_eV is None or relaxation.status == "failed":
            one.status = "failed"
            return
        assert self.clean is not None
        one.anomalies = molecule_anomalies(one.placement, relaxation.atoms, self.clean.atoms)
        if one.anomalies:
            one.status = "anomalous"

    def _total(self, best: Arrangement) -> float | None:
        """Adsorption energy of all molecules of an arrangement, eV; None where it is not defined."""
        is_defined = self.kind == "total" or best.count == 1
        return self._energy(best.count, best.relaxation) if is_defined else None

    @staticmethod
    def _lowest(found: Sequence[Arrangement]) -> Arrangement | None:
        """The lowest converged arrangement, or the lowest unconverged one where none has converged."""

        def energy(one: Arrangement) -> float:
            return float("inf") if one.relaxation is None else float(one.relaxation.energy_eV or 0.0)

        for status in ("converged", "unconverged"):
            known = [one for one in found if one.status == status]
            if known:
                return min(known, key=energy)
        return None


def attraction_notices(rows: Sequence[CoverageRow]) -> list[str]:
    """Say where molecules are bound more strongly at a higher coverage than at a lower one.

    Adsorbates mostly repel each other, so that their average energy rises with coverage.

    Args:
        rows: of a series, ascending.
    """
    known = [(row.count, row.average) for row in rows if row.average is not None]
    sentences = []
    for (fewer, higher), (count, lower) in pairwise(known):
        if lower < higher - FALL:
            sentences.append(
                f"the average adsorption energy falls from {higher:.3f} eV with {fewer} in the cell to "
                f"{lower:.3f} eV with {count}: either the molecules attract each other, or it is an "
                f"artefact, of a lower arrangement of {fewer} that was not found (more --placements) or of a "
                "model that does not know such coverages; look at the structures before using it"
            )
    return sentences


def molecule_anomalies(placement: Placement, final: Atoms, clean_slab: Atoms) -> list[str]:
    """Find the anomalies of every molecule of an arrangement, and bonds between molecules.

    Each molecule is judged by OC20's rules as if it were alone (`check_anomalies`). Two molecules have bound
    where they touch, which at the start they do not.

    Args:
        placement: the start.
        final: the same atoms after the relaxation.
        clean_slab: the relaxed slab without adsorbate.

    Returns:
        Sentences; none for intact, bound molecules on an unchanged slab.
    """
    initial = placement.atoms
    slab = np.arange(len(clean_slab))
    sentences = []
    for number, group in enumerate(placement.molecules):
        members = np.concatenate([slab, np.array(group, dtype=int)])
        tags = initial.get_tags()[members]
        for anomaly in check_anomalies(initial[members], final[members], tags, clean_slab):
            if anomaly.name == "surface_changed" and number:
                continue  # of the slab, told once
            if anomaly.present:
                whose = "" if anomaly.name == "surface_changed" else f"molecule {number}: "
                sentences.append(whose + anomaly.sentence)
    radii = covalent_radii[final.numbers]
    for number, group in enumerate(placement.molecules):
        for other, others in enumerate(placement.molecules[:number]):
            first, second = list(group), list(others)
            _, distance = get_distances(
                final.positions[first], final.positions[second], cell=final.cell, pbc=final.pbc
            )
            if (distance < radii[first][:, None] + radii[second] + SKIN).any():
                sentences.append(f"molecules {other} and {number} have bound to each other")
    return sentences


def coverage_picture(rows: Sequence[CoverageRow], adsorbate: str) -> bytes:
    """Draw average and differential adsorption energies against coverage, as PNG."""
    figure = new_figure(6.4, 4.2)
    axis = figure.subplots()
    for name, colour, marker in (("average", "#1f4e79", "o"), ("differential", "#a33c1f", "s")):
        points = [(row.coverage, getattr(row, name)) for row in rows if getattr(row, name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker + "-", color=colour, label=name)
    axis.set(
        xlabel="coverage (molecules per surface atom)",
        ylabel="adsorption energy (eV per molecule)",
        title=f"{adsorbate}: lowest arrangement of each coverage",
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return png_bytes(figure)


def _file(count: int) -> str:
    return f"n{count:02d}.extxyz"

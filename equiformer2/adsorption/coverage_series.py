"""Adsorption energies over coverage: one, two, three and more molecules of one or several species on a slab.

E_n = E(slab with n molecules) - E(slab) - n E(molecule) of the lowest arrangement of n molecules gives the
average energy E_n / n and the differential energy, by which one molecule more changes it. In a mixture n is a
number for each species, and the energies of all molecules are subtracted. All differences are between total
energies of one calculator.
"""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import le
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
from equiformer2.adsorption.coverage_rows import (
    Arrangement,
    Composition,
    CoverageRow,
    CoverageSeries,
    Species,
    attraction_notices,
    coverage_picture,
)
from equiformer2.adsorption.dispersion_terms import refuse_dispersion
from equiformer2.adsorption.named_structures import free_side_up
from equiformer2.adsorption.placements import (
    Adsorbate,
    Placement,
    as_adsorbate,
    coverage_placements,
    separate_adsorbates,
)
from equiformer2.adsorption.references import check_gas_references, kept_gas_reference, refuse_gas_references
from equiformer2.adsorption.saddle_points import (
    DISPLACEMENT,
    FALL,
    SaddleCheck,
    check_settings,
    displaced,
    status_of_check,
)
from equiformer2.adsorption.search_folder import CARD, CLEAN_SLAB, GAS, is_search, refuse_other_settings
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
from equiformer2.inference.record import model_record, write_structure
from equiformer2.inference.relaxation_store import RelaxationStore
from equiformer2.script import header

logger = logging.getLogger(__name__)

COVERAGE = "coverage.json"
"""Record of a finished series, in its folder."""

_PICTURE = "coverage.png"
_LAYER = 0.5
"""Å of height that belong to the outermost layer of atoms."""


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


def coverage_series(
    slab: Any,
    adsorbate: Adsorbate | Sequence[Adsorbate],
    calculator: BaseCalculator,
    counts: Sequence[int | Sequence[int]] | None = None,
    settings: CoverageSettings | None = None,
    *,
    out: AnyPath | None = None,
    overwrite: bool = False,
    energy_kind: str | None = None,
    describe: Callable[[list[Atoms]], dict[str, Any]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> CoverageSeries:
    """Relax arrangements of several molecules on one slab, and compare the lowest of every composition.

    An arrangement does not count if a molecule has an anomaly, or if two molecules have bound to each other.
    A model of adsorption energies has one mean per structure, so that only the energy of a single molecule is
    defined: structures are relaxed and the lowest of every number is found, but the other energies are None,
    and a notice says so.

    Args:
        slab: clean slab, as `find_slab` takes it: held atoms stay held, and without one OC20's are.
        adsorbate: name, file, or structure, as in `placements`; or a list of several, for mixtures.
        calculator: any ASE calculator.
        counts: numbers of molecules, or compositions of a mixture: a number for each adsorbate. A number
            alone stands for all compositions of as many molecules. None for 1 to 4 molecules, and for 1 and
            2 of a mixture, as many as fit.
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
        series.notices += attraction_notices(rows, series.species)
        if finished is not None and series.is_result(folder, finished, rows):
            logger.info(f"{folder} holds this series, finished: its result is given, and nothing is written")
            notices = tuple(finished["notices"])
            kind, atoms = series.kind, series.surface_atoms
            return CoverageSeries(rows, kind, atoms, notices, finished, series.species)
        return series.write(
            folder, rows, describe or series.description, {"slab": clean.report.summary(), **(notes or {})}
        )


class _Series:
    """One series; arguments as of `coverage_series`."""

    def __init__(
        self,
        slab: Atoms,
        adsorbate: Adsorbate | Sequence[Adsorbate],
        calculator: BaseCalculator,
        settings: CoverageSettings,
        energy_kind: str | None,
    ) -> None:
        self.slab, self.calculator, self.settings = slab, calculator, settings
        self.adsorbates = separate_adsorbates(adsorbate)
        self.molecules = [as_adsorbate(one)[0] for one in self.adsorbates]
        self.species = Species.of(self.adsorbates, self.molecules)
        self.adsorbate = " + ".join(self.species.names)
        if not self.species.mixed:
            self.adsorbate = self.molecules[0].get_chemical_formula()
        self.relaxation = RelaxationSettings(fmax=settings.fmax, steps=settings.steps)
        refuse_dispersion(calculator, "a coverage series")
        self.engine = open_engine(calculator)
        self.kind = resolve_energy_kind(calculator, energy_kind)
        self.cutoff = None
        if isinstance(calculator, EquiformerV2Calculator):
            self.cutoff = calculator.predictor.checkpoint.config.max_radius
        surface = free_side_up(slab)[0].atoms
        heights = surface.positions[open_atoms(surface), 2]
        self.surface_atoms = len(heights)
        self.area = surface_area(slab)
        self.arrangements: dict[Composition, list[Arrangement]] = {}
        self.notices: list[str] = []
        outermost = int((heights > heights.max() - _LAYER).sum())
        if outermost < self.surface_atoms:
            self.notices.append(
                f"{self.surface_atoms} atoms are seen from above and {outermost} of them are the outermost "
                f"layer: where a monolayer is counted by that layer, it is a coverage of "
                f"{outermost / self.surface_atoms:.2f} here"
            )
        self.terms: dict[str, float] = {}
        self.gas: dict[str, dict[str, Any]] = {}
        self.clean: Relaxation | None = None
        self.checks: list[SaddleCheck] = []

    def arrange(self, counts: Sequence[int | Sequence[int]] | None) -> None:
        """Place the molecules, and mark arrangements that are copies by symmetry."""
        symmetry = surface_symmetry(self.slab)
        left_out: list[Composition] = []
        for composition in self.species.compositions(counts):
            if any(all(map(le, fewer, composition)) for fewer in left_out):
                continue
            count = sum(composition)
            told = self.species.text(composition) if self.species.mixed else f"{count} of the adsorbate"
            pairs = zip(self.adsorbates, composition, strict=True)
            try:
                placed = coverage_placements(
                    self.slab,
                    [adsorbate for adsorbate, number in pairs for _ in range(number)],
                    self.settings.placements,
                    self.settings.seed,
                    min_distance=self.settings.min_distance,
                    cutoff=self.cutoff,
                )
            except InputError as error:
                if counts is not None or count == 1:
                    raise InputError(f"{told}: {error}") from error
                told = told if self.species.mixed else f"{count} molecules"
                self.notices.append(f"{told} do not fit, and the series ends before them: {error}")
                left_out.append(composition)
                continue
            label = self.species.label(composition)
            found = [Arrangement(f"{label}-{one.id}", composition, one) for one in placed]
            adsorbates = [one.placement.atoms[len(self.slab) :] for one in found]
            for one, first in zip(found, merge_copies(adsorbates, symmetry), strict=True):
                if found[first] is not one:
                    one.status, one.merged_into = "merged", found[first].id
            self.arrangements[composition] = found
        for molecule in self.molecules if self.kind == "total" else []:
            check_gas_references(molecule, self.settings.gas_per_atom, self.settings.gas)
        if self.kind != "total":
            refuse_gas_references(self.settings.gas_per_atom, self.settings.gas)
        if self.kind != "total" and max(map(sum, self.arrangements)) > 1:
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
        wanted = [self.species.by_name(composition) for composition in self.arrangements]
        first = self.species.names[0]
        rows = [
            row.get("composition") or {first: row.get("molecules")} for row in finished.get("coverages") or []
        ]
        if rows != wanted:
            names.append("counts")
        refuse_other_settings(folder, names, "series")

    def is_result(self, folder: Path, finished: Mapping[str, Any], rows: Sequence[CoverageRow]) -> bool:
        """Tell whether the files of a finished series are all there and say what its rows say."""
        now = json.loads(json.dumps([row.summary(self.area, self.species) for row in rows]))
        return bool(finished.get("coverages") == now) and all(
            (folder / name).exists() for name in finished.get("files") or [COVERAGE]
        )

    def relax(self, folder: Path) -> None:
        """Relax the clean slab and all arrangements; those of an earlier run are read."""
        identity = {
            "model": self.engine.identity(),
            "adsorbate": self.adsorbate,
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
                self._refer(folder)
            starts = [(name, one.placement.atoms) for name, one in waiting.items()]
            bar = tqdm(total=len(starts), desc="relaxing", unit="arrangement", disable=None, leave=False)
            for relaxation in self._relaxed(store, starts):
                self._judge(waiting[relaxation.id], relaxation)
                bar.update()
            bar.close()
            for found in self.arrangements.values():
                self._check_lowest(store, found)

    def rows(self) -> Iterator[CoverageRow]:
        """Give the lowest arrangement of every composition, and its energies."""
        lowest = {composition: self._lowest(found) for composition, found in self.arrangements.items()}
        totals = {one: None if best is None else self._total(best) for one, best in lowest.items()}
        nothing = (0,) * len(self.species.names)  # the clean slab
        differences = self.species.differences({nothing: 0.0, **totals})
        for composition, best in lowest.items():
            count, total = sum(composition), totals[composition]
            statuses = dict(Counter(one.status for one in self.arrangements[composition]))
            reason = ""
            if best is None:
                listed = ", ".join(f"{number} {status}" for status, number in statuses.items())
                reason = f"no arrangement has kept its molecules ({listed})"
            elif total is None:
                reason = "not defined for a model of adsorption energies"
            yield CoverageRow(
                composition,
                count / self.surface_atoms,
                total,
                None if total is None else total / count,
                *differences[composition],
                best,
                statuses,
                reason,
            )

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
                structures[f"{self.species.label(row.composition)}.extxyz"] = row.best.relaxation.atoms
        for name, atoms in structures.items():
            write_structure(folder / name, atoms)
        files = [*structures, "trajectories"]
        if any(row.total is not None for row in rows):
            write_bytes(folder / _PICTURE, coverage_picture(rows, self.species, self.adsorbate))
            files.append(_PICTURE)
        model = describe(list(structures.values())[1:])
        everything = [one.summary() for found in self.arrangements.values() for one in found]
        checks = [check.summary() for check in self.checks]
        files += [CARD]
        record = {
            **header("adsorption-coverage/1", model.get("checkpoint")),
            "adsorbate": self.adsorbate,
            "species": list(self.species.names),
            "energy_kind": self.kind,
            "converged": all(row.converged for row in rows)
            and all(one["converged"] for one in self.gas.values())
            and (self.clean.converged or not self.gas),
            "surface_atoms": self.surface_atoms,
            "area_A2": self.area,
            "coverages": [row.summary(self.area, self.species) for row in rows],
            "arrangements": everything,
            "saddle_check": {"displacement_A": DISPLACEMENT, "tolerance_eV": FALL, "checks": checks},
            "model_evaluations": self.clean.model_evaluations
            + sum(row["model_evaluations"] for row in [*everything, *checks]),
            "terms_eV": self.terms,
            "gas": self.gas if self.species.mixed else next(iter(self.gas.values()), None),
            "clean_slab": {"converged": self.clean.converged, "max_force_eV_A": self.clean.max_force_eV_A},
            "notices": self.notices,
            "model": dict(model),
            "settings": {**self.settings.summary(), **notes},
            "files": files,
        }
        write_json(folder / CARD, self._card(folder, rows, record))
        write_json(folder / COVERAGE, record)
        return CoverageSeries(rows, self.kind, self.surface_atoms, tuple(self.notices), record, self.species)

    def description(self, structures: list[Atoms]) -> dict[str, Any]:
        """Plain values about a calculator that was given in Python."""
        if isinstance(self.calculator, EquiformerV2Calculator):
            return {**model_record(self.calculator.predictor, "", structures), "checkpoint": None}
        return {"checkpoint": None, **calculator_identity(self.calculator), "energy_kind": self.kind}

    def _relaxed(self, store: RelaxationStore, starts: Sequence[tuple[str, Atoms]]) -> Iterator[Relaxation]:
        yield from store.relax(starts, self.engine, self.relaxation)

    def _refer(self, folder: Path) -> None:
        """Find the energies of clean slab and molecules; those of molecules are kept in the folder."""
        assert self.clean is not None
        relaxing = {"optimizer": "LBFGS", "fmax": self.settings.fmax, "steps": self.settings.steps}
        given, source = self.settings.gas_per_atom, self.settings.gas
        self.terms = {"slab": float(self.clean.energy_eV or 0.0)}
        for name, molecule in zip(self.species.names, self.molecules, strict=True):
            key = name if self.species.mixed else None
            gas = kept_gas_reference(folder / GAS, molecule, self.calculator, given, source, relaxing, key)
            self.gas[name] = gas
            self.terms[self.species.gas_term(name)] = float(gas["energy_eV"])
            if not gas["converged"]:
                of = f"molecule {name}" if self.species.mixed else "molecule"
                self.notices.append(f"the {of} by itself has not converged")

    def _card(self, folder: Path, rows: Sequence[CoverageRow], record: Mapping[str, Any]) -> dict[str, Any]:
        """Trust card of the series."""
        assert self.clean is not None
        structures = []
        if self.kind == "total":  # a model of adsorption energies has none for it
            structures = [card_structure(CLEAN, self.clean.atoms, folder / CLEAN_SLAB)]
        chosen = [row.best for row in rows if row.best is not None and row.best.relaxation is not None]
        label = self.species.label
        best = {label(one.composition): one.relaxation.atoms for one in chosen if one.relaxation is not None}
        structures += [card_structure(name, atoms, folder / f"{name}.extxyz") for name, atoms in best.items()]
        provenance = None
        if isinstance(self.calculator, EquiformerV2Calculator):
            provenance = self.calculator.predictor.provenance
        largest = list(best.values())[-1] if best else self.clean.atoms
        kept = ("adsorbate", "species", "energy_kind", "converged", "coverages", "terms_eV", "gas")
        return {
            **header("adsorption-coverage-card/1", record["model"].get("checkpoint")),
            **{name: record[name] for name in (*kept, "saddle_check")},
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
            known.sort(key=lambda one: self._energy(one.composition, one.relaxation) or 0.0)
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
        trial = Arrangement(one.id, one.composition, one.placement)
        self._judge(trial, relaxation)
        before, after = (self._energy(one.composition, each) for each in (one.relaxation, relaxation))
        status = status_of_check(trial.status, relaxation, self.settings.fmax)
        check = SaddleCheck(one.id, relaxation, float(before or 0.0), after, status)
        self.checks.append(check)
        if check.fell:
            logger.info(check.sentence)
            one.saddle, one.relaxation = one.relaxation, relaxation
        elif not check.stays:
            because = f" ({trial.anomalies[0]})" if trial.anomalies else ""
            self.notices.append(f"{check.sentence}{because}")

    def _energy(self, composition: Composition, relaxation: Relaxation | None) -> float | None:
        """Energy of a relaxation: of all molecules, or the model's own where that is not defined, eV."""
        if relaxation is None or relaxation.energy_eV is None:
            return None
        gas = self.species.gas_energy(self.species.by_name(composition), self.terms)
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
        return self._energy(best.composition, best.relaxation) if is_defined else None

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

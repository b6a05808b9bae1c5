"""Search for the adsorption energy: many placements, relaxed and compared, until the lowest is likely found.

Placements that symmetry makes equal are merged, the others relaxed in rounds. Structures with an anomaly do
not count. After every round the basins seen so far tell how likely a lower one is (`adsorption.basins`), and
the search stops where that is unlikely. The lowest minimum is displaced and relaxed again, since it may be a
saddle point (`adsorption.saddle_points`). Every finished relaxation is in the folder, so that a stopped
search goes on where it was.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.geometry import find_mic
from tqdm import tqdm

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.anomalies import Anomaly, check_anomalies
from equiformer2.adsorption.basins import Coverage, estimate_coverage, find_basins
from equiformer2.adsorption.dispersion_terms import check_gas_source, dispersion_terms
from equiformer2.adsorption.energy import resolve_energy_kind
from equiformer2.adsorption.references import check_gas_references, kept_gas_reference, refuse_gas_references
from equiformer2.adsorption.saddle_points import SaddleCheck, check_settings, displaced, status_of_check
from equiformer2.adsorption.search_folder import (
    GAS,
    RELAXED,
    SETTINGS,
    TRAJECTORIES,
    is_series,
    refuse_other_settings,
    remove_search,
)
from equiformer2.adsorption.symmetry import SurfaceSymmetry, merge_copies, surface_symmetry
from equiformer2.errors import InputError
from equiformer2.files import read_json
from equiformer2.inference.atoms import fixed_mask
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.engines import Engineable, open_engine
from equiformer2.inference.many import Relaxation
from equiformer2.inference.relaxation_store import RelaxationStore

logger = logging.getLogger(__name__)

#: Å; an adsorbate that has moved farther along the surface is on another site.
MIGRATION = 0.6
#: Relaxations between two estimates of what is missing.
_ROUND = 8
_CLEAN_SLAB = "clean_slab"
#: Endings of the names of relaxations that are no placements.
_CHECK, _START = ".check", ".start"


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search.

    Attributes:
        fmax: eV/Å; a relaxation has converged when no force on a free atom reaches it.
        steps: most steps of a relaxation.
        stop: stop before all placements are relaxed where a lower minimum is unlikely.
        gas: source of the gas references of a total-energy model (`references.gas_reference`).
        gas_per_atom: eV per atom, instead of it.
        batch_size: structures per batch, or `"auto"`.
        check_minima: number of the lowest minima that are displaced and relaxed again, since they may be
            saddle points; 0 for none.
        seed: of these displacements.
        stop_at_spread: eV/Å; end a relaxation where the forces of a committee differ by more.

    Raises:
        InputError: a number of minima below 0.
    """

    fmax: float = 0.05
    steps: int = 300
    stop: bool = True
    gas: str = "vacuum"
    gas_per_atom: Mapping[str, float] = field(default_factory=dict)
    batch_size: int | str = "auto"
    check_minima: int = 1
    seed: int = 0
    stop_at_spread: float | None = None

    def __post_init__(self) -> None:
        if self.check_minima < 0:
            raise InputError(f"check_minima is {self.check_minima}: give 0 or more")

    def relaxation(self) -> RelaxationSettings:
        """Settings of every relaxation of a start."""
        return RelaxationSettings(fmax=self.fmax, steps=self.steps, stop_at_spread=self.stop_at_spread)

    def clean_slab(self) -> RelaxationSettings:
        """Settings of the relaxation of the clean slab."""
        return RelaxationSettings(fmax=self.fmax, steps=self.steps)

    def check(self) -> RelaxationSettings:
        """Settings of the relaxations of displaced minima."""
        return check_settings(self.fmax, self.steps)


@dataclass
class Found:
    """One placement and what became of it.

    Attributes:
        id: its name.
        start: slab and adsorbate as they were placed.
        status: `converged`, `unconverged`, `merged` (a copy of `merged_into` by symmetry), `stopped` (not
            relaxed, because the search had stopped), `anomalous` or `failed`.
        merged_into: id of the placement that it is a copy of.
        basin: id of the lowest placement in the same minimum.
        relaxation: that which its energy is of; None for a copy.
        saddle: its own relaxation where that has ended on a saddle point; `relaxation` is then the one that
            has left it.
        energy: adsorption energy of the relaxed structure, eV.
        start_energy: of the start, eV.
        anomalies: verdicts of all rules.
        migration: Å that the adsorbate has moved along the surface.
        saddle_energy: adsorption energy of the saddle point, eV.
    """

    id: str
    start: Atoms
    status: str = "stopped"
    merged_into: str | None = None
    basin: str | None = None
    relaxation: Relaxation | None = None
    saddle: Relaxation | None = None
    energy: float | None = None
    start_energy: float | None = None
    anomalies: list[Anomaly] = field(default_factory=list)
    migration: float | None = None
    saddle_energy: float | None = None

    @property
    def counts(self) -> bool:
        """True if it has ended in a minimum that is the intended adsorbate's."""
        return self.status == "converged"

    @property
    def own(self) -> Relaxation | None:
        """The relaxation of its start."""
        return self.saddle or self.relaxation

    def summary(self) -> dict[str, Any]:
        """Plain values for `search.json`."""
        done, own = self.relaxation, self.own
        has_structure = done is not None and done.energy_eV is not None
        return {
            "id": self.id,
            "status": self.status,
            "merged_into": self.merged_into,
            "basin": self.basin,
            "steps": None if own is None else own.steps,
            "energy_eV": self.energy,
            "start_energy_eV": self.start_energy,
            "max_force_eV_A": None if done is None else done.max_force_eV_A,
            "model_evaluations": 0 if own is None else own.model_evaluations,
            "draft_evaluations": 0 if own is None else own.draft_evaluations,
            # Files are named like relaxations.
            "trajectory": f"{TRAJECTORIES}/{done.id}.traj" if done is not None and has_structure else None,
            "checked_by": done.id if done is not None and self.saddle is not None else None,
            "saddle_energy_eV": self.saddle_energy,
            "anomalies": [
                one.summary() | {"sentence": one.sentence} for one in self.anomalies if one.present
            ],
            "migration_A": self.migration,
            "reason": None if done is None else done.reason,
        }


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search.

    Attributes:
        found: all placements, in their order.
        best: the lowest one; the lowest unconverged one where none has converged; None where every one has
            an anomaly or failed.
        coverage: estimate of what was not seen.
        reason: sentence about why the search ended.
        clean_slab: relaxed without the adsorbate.
        terms: eV; for a total-energy model `slab` and `gas`, which every energy has subtracted.
        gas: what was subtracted for the adsorbate, plain values; None for an adsorption-energy model.
        energy_kind: of the model.
        symmetry_operations: number of operations of the clean slab.
        model_evaluations: calls of the model for everything.
        draft_evaluations: calls of the model that drafted.
        checks: of the lowest minima, which may have been saddle points.
    """

    found: list[Found]
    best: Found | None
    coverage: Coverage
    reason: str
    clean_slab: Relaxation
    terms: dict[str, float]
    gas: dict[str, Any] | None
    energy_kind: str
    symmetry_operations: int
    model_evaluations: int
    draft_evaluations: int = 0
    checks: list[SaddleCheck] = field(default_factory=list)

    @property
    def unconverged(self) -> list[str]:
        """Name the parts of the best placement's energy that have not converged."""
        parts = {"the best placement": self.best is not None and self.best.status != "converged"}
        if self.energy_kind == "total":
            parts["the clean slab"] = not self.clean_slab.converged
            parts["the gas references"] = self.gas is not None and not self.gas.get("converged", True)
        return [name for name, is_so in parts.items() if is_so]

    @property
    def energy(self) -> float | None:
        """Adsorption energy of the best placement, eV; None without one."""
        return None if self.best is None else self.best.energy

    def ranking(self) -> list[Found]:
        """The lowest placement of every basin, lowest first."""
        return _ranked(self.found)


def _ranked(found: Sequence[Found]) -> list[Found]:
    """The lowest placement of every basin, lowest first."""
    return sorted(
        (one for one in found if one.basin == one.id and one.energy is not None),
        key=lambda one: float(one.energy or 0.0),
    )


def search_placements(
    slab: Atoms,
    placed: Sequence[tuple[str, Atoms]],
    calculator: BaseCalculator,
    folder: AnyPath,
    settings: SearchSettings | None = None,
    identity: Mapping[str, Any] | None = None,
    clean_slab: Relaxation | None = None,
    draft: Engineable | None = None,
    overwrite: bool = False,
    finished: bool = False,
) -> SearchResult:
    """Relax placements of one adsorbate on one slab until the lowest is likely found.

    Args:
        slab: clean slab as it was cut, with tags and held atoms.
        placed: name and structure of every placement: the slab's atoms in its order, then the adsorbate's
            with tag 2. Their order is that of the search.
        calculator: any ASE calculator.
        folder: for the relaxations; a folder of the same search is continued.
        settings: of the search.
        identity: further plain values that tell this search from others, such as how placements were made.
        clean_slab: relaxed by the same model with the same settings, such as an earlier search's; None
            relaxes it.
        draft: a cheaper model, such as a pruned network, that relaxes every placement first. The answer is a
            minimum of `calculator` all the same; where a draft fails, that starts from the placement.
        overwrite: replace another search in the folder; what is no file of a search stays.
        finished: the folder holds a finished search; another one than this is refused.

    Raises:
        InputError: no placement, placements on another slab, a folder of another search, and what the model
            refuses. Placements that all fail or have an anomaly are no error: `best` is None.
    """
    search = _Search(
        slab, placed, calculator, Path(folder), settings or SearchSettings(), identity or {}, draft
    )
    if overwrite:
        search.replace_another()
    if finished:
        search.check_same()
    return search.run(clean_slab)


def stored_clean_slab(
    folder: AnyPath, slab: Atoms, calculator: BaseCalculator, settings: SearchSettings
) -> Relaxation | None:
    """The relaxed clean slab of an earlier search of the same slab by the same model with the same settings.

    Args:
        folder: of that search, finished or not.
        slab: clean slab as it was cut.
        calculator: the model.
        settings: of the search.

    Returns:
        The relaxation; None where there is none, or it cannot be read.
    """
    folder = Path(folder)
    if not (folder / RELAXED).is_file():
        return None
    with suppress(InputError, DataError, OSError):
        identity = read_json(folder / SETTINGS)
        model = json.loads(json.dumps(open_engine(calculator).identity(), default=str))
        same = {"model": model, "slab": _digest(slab)}
        if all(identity.get(name) == value for name, value in same.items()):
            with RelaxationStore(folder, identity) as store:
                if _CLEAN_SLAB in store.finished:
                    starts = [(_CLEAN_SLAB, slab)]
                    return next(store.relax(starts, open_engine(calculator), settings.clean_slab()))
    return None


class _Search:
    """One search; arguments as of `search_placements`."""

    def __init__(
        self,
        slab: Atoms,
        placed: Sequence[tuple[str, Atoms]],
        calculator: BaseCalculator,
        folder: Path,
        settings: SearchSettings,
        identity: Mapping[str, Any],
        draft: Engineable | None,
    ) -> None:
        if is_series(folder):
            raise InputError(f"{folder} holds a coverage series, and no search: give another folder")
        if not placed:
            raise InputError("there is no placement to relax: every one was refused, or none was asked for")
        for name, atoms in placed:
            if not np.array_equal(atoms.numbers[: len(slab)], slab.numbers) or len(atoms) <= len(slab):
                raise InputError(f"the placement {name} is not an adsorbate on this slab")
            if not np.array_equal(atoms.numbers, placed[0][1].numbers):
                raise InputError(f"the placements {placed[0][0]} and {name} are of different adsorbates")
        self.slab, self.folder, self.settings = slab, folder, settings
        self.calculator = calculator
        self.engine = open_engine(calculator)
        self.draft = None if draft is None else open_engine(draft)
        if self.draft is not None:
            self.draft.energies_matter = False
        self.kind = resolve_energy_kind(calculator, self.engine.energy_kind)
        self.found = [Found(name, atoms) for name, atoms in placed]
        self.by_id = {one.id: one for one in self.found}
        if len(self.by_id) < len(placed):
            raise InputError("two placements have the same name: give each its own")
        self.adsorbate = placed[0][1][len(slab) :]
        check_gas_source(calculator, settings.gas, settings.gas_per_atom)
        if self.kind == "total":
            check_gas_references(self.adsorbate, settings.gas_per_atom, settings.gas)
        else:
            refuse_gas_references(settings.gas_per_atom, settings.gas)
        self.identity = {
            "model": self.engine.identity(),
            "draft": None if self.draft is None else self.draft.identity(),
            "slab": _digest(slab),
            "adsorbate": self.adsorbate.get_chemical_formula(),
            "gas": settings.gas,
            # Those of other elements change nothing.
            "gas_per_atom": {
                symbol: energy
                for symbol, energy in settings.gas_per_atom.items()
                if symbol in self.adsorbate.get_chemical_symbols()
            },
            **identity,
        }
        self.evaluations = self.draft_evaluations = 0
        self.gas: dict[str, Any] | None = None
        self.checks: list[SaddleCheck] = []

    def check_same(self) -> None:
        """Raise `InputError` where the finished search in the folder is another one than this."""
        before = read_json(self.folder / SETTINGS)
        now = json.loads(json.dumps(self.identity, default=str))
        refuse_other_settings(self.folder, [name for name in now if before.get(name) != now[name]])

    def replace_another(self) -> None:
        """Remove the files of another search from the folder."""
        if not self.folder.is_dir() or not any((self.folder / name).exists() for name in (RELAXED, SETTINGS)):
            return
        try:
            with RelaxationStore(self.folder, self.identity) as store:
                store.check([(_CLEAN_SLAB, self.slab)], self.settings.clean_slab())
                starts = [(one.id, one.start) for one in self.found]
                store.check(starts, self.settings.relaxation(), self.draft is not None)
        except InputError:
            remove_search(self.folder)

    def run(self, clean: Relaxation | None = None) -> SearchResult:
        """Relax in rounds, and stop by the rule; check what is lowest, and go on where that has changed."""
        with RelaxationStore(self.folder, self.identity) as store:
            clean = self._clean_slab(store, clean)
            terms = self._terms(clean)
            self.clean, self.subtracted = clean.atoms, sum(terms.values())
            symmetry = surface_symmetry(self.slab, clean.atoms)
            self._merge(surface_symmetry(self.slab))
            waiting = [one for one in self.found if one.merged_into is None]
            coverage = estimate_coverage([], [], len(self.found))
            with tqdm(
                total=len(waiting), desc="relaxing", unit="placement", disable=None, leave=False
            ) as bar:
                reason, fell = "", True
                while fell:
                    coverage, reason, waiting = self._rounds(store, symmetry, waiting, coverage, bar)
                    fell = self._check_lowest(store, symmetry)
                    coverage = self._coverage(symmetry)
            best = self._best()
            if best is not None:
                self._find_start_energy(store, best)
        return SearchResult(
            self.found,
            best,
            coverage,
            reason,
            clean,
            terms,
            self.gas,
            self.kind,
            len(symmetry),
            self.evaluations,
            self.draft_evaluations,
            self.checks,
        )

    def _clean_slab(self, store: RelaxationStore, clean: Relaxation | None) -> Relaxation:
        """Relax the clean slab, by the full model alone; one that is given is kept."""
        if clean is None or _CLEAN_SLAB in store.finished:
            # A model of adsorption energies has none for it; its geometry is what anomalies are found by.
            self.engine.energies_matter = self.kind == "total"
            (clean,) = self._relaxed(store, [(_CLEAN_SLAB, self.slab)], self.settings.clean_slab())
            self.engine.energies_matter = True
        if clean.status == "failed" or clean.energy_eV is None:
            raise InputError(f"the clean slab cannot be relaxed: {clean.reason}")
        store.adopt(clean, self.slab, self.settings.clean_slab())
        return clean

    def _rounds(
        self,
        store: RelaxationStore,
        symmetry: SurfaceSymmetry,
        waiting: list[Found],
        coverage: Coverage,
        bar: "tqdm[Any]",
    ) -> tuple[Coverage, str, list[Found]]:
        """Relax starts until a lower minimum is unlikely; gives why it ended, and what is left."""
        while waiting:
            if self.settings.stop and coverage.enough:
                reason = (
                    f"a minimum 0.1 eV lower among the other {len(waiting)} starts has a probability of "
                    f"{coverage.p_lower:.1%}"
                )
                return coverage, reason, waiting
            now, waiting = waiting[:_ROUND], waiting[_ROUND:]
            starts = [(one.id, one.start) for one in now]
            for relaxation in self._relaxed(store, starts, draft=True):
                self._judge(self.by_id[relaxation.id], relaxation)
                bar.update()
            coverage = self._coverage(symmetry)
            logger.info(self._progress(coverage, len(waiting)))
        return coverage, "all placements were relaxed", waiting

    def _relaxed(
        self,
        store: RelaxationStore,
        starts: Sequence[tuple[str, Atoms]],
        settings: RelaxationSettings | None = None,
        draft: bool = False,
    ) -> Iterator[Relaxation]:
        settings = settings or self.settings.relaxation()
        drafting = self.draft if draft else None
        for result in store.relax(starts, self.engine, settings, self.settings.batch_size, draft=drafting):
            self.evaluations += result.model_evaluations
            self.draft_evaluations += result.draft_evaluations
            yield result

    def _check_lowest(self, store: RelaxationStore, symmetry: SurfaceSymmetry) -> bool:
        """Displace the lowest minima and relax them again, until they stay; True if one did not."""
        fell = False
        while True:
            done = {check.placement for check in self.checks}
            checked = {one.basin for one in self.found if one.id in done or one.saddle is not None}
            lowest = _ranked(self.found)[: self.settings.check_minima]
            one = next((one for one in lowest if one.basin not in checked), None)
            if one is None:
                return fell
            check = self._check(store, one)
            self.checks.append(check)
            if check.fell:
                fell = True
                self._leave_saddle(one, check)
                self._coverage(symmetry)

    def _check(self, store: RelaxationStore, one: Found) -> SaddleCheck:
        """Relax a displaced minimum."""
        assert one.relaxation is not None
        assert one.energy is not None
        start = displaced(one.relaxation.atoms, one.id, self.settings.seed)
        (found,) = self._relaxed(store, [(f"{one.id}{_CHECK}", start)], self.settings.check())
        trial = Found(one.id, one.start)
        self._judge(trial, found)
        status = status_of_check(trial.status, found, self.settings.fmax)
        check = SaddleCheck(one.id, found, one.energy, trial.energy, status)
        if check.fell:
            logger.info(check.sentence)
        elif not check.stays:
            logger.warning(f"{check.sentence} ({found.reason or 'see search.json'})")
        return check

    def _leave_saddle(self, one: Found, check: SaddleCheck) -> None:
        """Give all placements on a saddle point the minimum that lies below it."""
        members = [other for other in self.found if other.basin == one.basin and other.relaxation is not None]
        for member in members:
            member.saddle, member.saddle_energy = member.relaxation, member.energy
            member.relaxation, member.energy = check.relaxation, check.energy
        start_energy = one.start_energy  # that of the check is of the displaced structure
        self._judge(one, check.relaxation)
        one.start_energy, one.status = start_energy, "converged"

    def _find_start_energy(self, store: RelaxationStore, best: Found) -> None:
        """Compute the energy of the start of the best placement, where a draft has moved it first."""
        if best.start_energy is None and best.relaxation is not None:
            settings = RelaxationSettings(fmax=self.settings.fmax, steps=0)
            (found,) = self._relaxed(store, [(f"{best.id}{_START}", best.start)], settings)
            if found.energy_eV is not None:
                best.start_energy = found.energy_eV - self.subtracted

    def _terms(self, clean: Relaxation) -> dict[str, float]:
        """Energies that every adsorption energy has subtracted; those of the gas are kept in the folder."""
        if self.kind == "adsorption":
            return dispersion_terms(self.calculator, clean.atoms, self.adsorbate)
        self.gas = kept_gas_reference(
            self.folder / GAS,
            self.adsorbate,
            self.calculator,
            self.settings.gas_per_atom,
            self.settings.gas,
            {"optimizer": "LBFGS", "fmax": self.settings.fmax, "steps": self.settings.steps},
        )
        return {"slab": float(clean.energy_eV or 0.0), "gas": float(self.gas["energy_eV"])}

    def _merge(self, symmetry: SurfaceSymmetry) -> None:
        """Mark placements that are copies of an earlier one under operations of the slab as it was cut."""
        adsorbates = [one.start[len(self.slab) :] for one in self.found]
        for one, first in zip(self.found, merge_copies(adsorbates, symmetry), strict=True):
            if self.found[first] is not one:
                one.status, one.merged_into = "merged", self.found[first].id

    def _judge(self, one: Found, relaxation: Relaxation) -> None:
        """Note what became of a placement."""
        one.relaxation, one.status = relaxation, relaxation.status
        if relaxation.status == "stopped":  # by the spread of a committee
            one.status = "unconverged"
        if relaxation.energy_eV is None:
            return
        one.energy = relaxation.energy_eV - self.subtracted
        if relaxation.start_energy_eV is not None:
            one.start_energy = relaxation.start_energy_eV - self.subtracted
        if relaxation.status == "failed":
            return
        final = relaxation.atoms
        one.anomalies = check_anomalies(one.start, final, one.start.get_tags(), self.clean)
        moved = final.positions[len(self.slab) :].mean(axis=0) - one.start.positions[len(self.slab) :].mean(
            axis=0
        )
        moved = find_mic(moved, final.cell, final.pbc)[0]
        normal = np.cross(final.cell[0], final.cell[1])
        normal /= np.linalg.norm(normal)
        one.migration = float(np.linalg.norm(moved - (moved @ normal) * normal))
        if any(anomaly.present for anomaly in one.anomalies):
            one.status = "anomalous"

    def _coverage(self, symmetry: SurfaceSymmetry) -> Coverage:
        """Find the basins anew, and estimate what is missing; copies count as often as they were placed.

        What is missing is that among the starts left, and with none left among as many as there were.
        """
        ended = [one for one in self.found if one.counts and one.relaxation is not None]
        atoms = [one.relaxation.atoms for one in ended if one.relaxation is not None]
        energies = [float(one.energy or 0.0) for one in ended]
        groups = find_basins(atoms, energies, symmetry)
        lowest = {
            group: min(
                (place for place, other in enumerate(groups) if other == group), key=energies.__getitem__
            )
            for group in groups
        }
        for one, group in zip(ended, groups, strict=True):
            one.basin = ended[lowest[group]].id
        for one in self.found:
            if one.merged_into is not None:
                first = self.by_id[one.merged_into]
                one.basin, one.energy = first.basin, first.energy
        draws = [one for one in self.found if one.basin is not None]
        names = {one.basin: number for number, one in enumerate(draws)}
        undone = sum(
            (one if one.merged_into is None else self.by_id[one.merged_into]).relaxation is None
            for one in self.found
        )
        return estimate_coverage(
            [names[one.basin] for one in draws],
            [float(one.energy or 0.0) for one in draws],
            undone or len(self.found),
        )

    def _progress(self, coverage: Coverage, left: int) -> str:
        lowest = min(
            (one.energy for one in self.found if one.counts and one.energy is not None), default=None
        )
        return (
            f"{coverage.draws} of {len(self.found)} placements in {coverage.basins} minima"
            + ("" if lowest is None else f", lowest {lowest:.3f} eV")
            + f"; unseen {coverage.unseen_probability:.1%}, lower by 0.1 eV {coverage.p_lower:.1%}; "
            f"{left} starts left"
        )

    def _best(self) -> Found | None:
        """The lowest converged placement, or the lowest that has not converged, with a warning."""
        for status in ("converged", "unconverged"):
            known = [
                one
                for one in self.found
                if one.status == status and one.relaxation is not None and one.energy is not None
            ]
            if known:
                if status == "unconverged":
                    logger.warning(f"no relaxation has converged in {self.settings.steps} steps")
                return min(known, key=lambda one: float(one.energy or 0.0))
        logger.warning(no_adsorbate_sentence(self.found))
        return None


def no_adsorbate_sentence(found: Sequence[Found]) -> str:
    """Say that no placement has relaxed to the intended adsorbate, and what became of them."""
    counts = {status: sum(one.status == status for one in found) for status in ("anomalous", "failed")}
    kinds = Counter(rule.name for one in found for rule in one.anomalies if rule.present)
    listed = ", ".join(f"{number} {name}" for name, number in kinds.most_common())
    reason = next((one.relaxation.reason for one in found if one.status == "failed" and one.relaxation), None)
    return (
        f"no placement has relaxed to the intended adsorbate: {counts['anomalous']} have an anomaly"
        + (f" ({listed})" if listed else "")
        + f", {counts['failed']} failed"
        + (f" ({reason})" if reason else "")
        + "; try more placements"
    )


def _digest(slab: Atoms) -> str:
    """Hash what a slab is: elements, positions and cell to 1e-6 Å, periodic directions, held atoms."""
    digest = hashlib.sha256()
    for values in (slab.numbers, slab.pbc, fixed_mask(slab)):
        digest.update(np.ascontiguousarray(values).astype(np.int64).tobytes())
    for values in (slab.positions, slab.cell.array):
        digest.update(np.round(np.asarray(values) * 1e6).astype(np.int64).tobytes())
    return digest.hexdigest()

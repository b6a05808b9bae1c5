"""Search for the adsorption energy: many placements, relaxed and compared, until the lowest is likely found.

Placements that symmetry makes equal are merged, the others relaxed in rounds. Structures with an anomaly do
not count. After every round the basins seen so far tell how likely a lower one is (`adsorption.basins`), and
the search stops where that is unlikely. Every finished relaxation is in the folder, so that a stopped search
goes on where it was.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.geometry import find_mic
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.anomalies import Anomaly, check_anomalies
from equiformer2.adsorption.basins import Coverage, estimate_coverage, find_basins
from equiformer2.adsorption.dispersion_terms import check_gas_source, dispersion_terms
from equiformer2.adsorption.energy import resolve_energy_kind
from equiformer2.adsorption.references import check_gas_references, gas_reference
from equiformer2.adsorption.symmetry import SurfaceSymmetry, merge_copies, surface_symmetry
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.inference.atoms import fixed_mask
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.engines import open_engine
from equiformer2.inference.many import Relaxation
from equiformer2.inference.relaxation_store import RelaxationStore

logger = logging.getLogger(__name__)

#: Å; an adsorbate that has moved farther along the surface is on another site.
MIGRATION = 0.6
#: Relaxations between two estimates of what is missing.
_ROUND = 8
_CLEAN_SLAB = "clean_slab"
_GAS = "gas.json"


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
    """

    fmax: float = 0.05
    steps: int = 300
    stop: bool = True
    gas: str = "vacuum"
    gas_per_atom: Mapping[str, float] = field(default_factory=dict)
    batch_size: int | str = "auto"

    def relaxation(self) -> RelaxationSettings:
        """Settings of every relaxation."""
        return RelaxationSettings(fmax=self.fmax, steps=self.steps)


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
        relaxation: its own one; None for a copy.
        energy: adsorption energy of the relaxed structure, eV.
        start_energy: of the start, eV.
        anomalies: verdicts of all rules.
        migration: Å that the adsorbate has moved along the surface.
    """

    id: str
    start: Atoms
    status: str = "stopped"
    merged_into: str | None = None
    basin: str | None = None
    relaxation: Relaxation | None = None
    energy: float | None = None
    start_energy: float | None = None
    anomalies: list[Anomaly] = field(default_factory=list)
    migration: float | None = None

    @property
    def counts(self) -> bool:
        """True if it has ended in a minimum that is the intended adsorbate's."""
        return self.status == "converged"

    def summary(self) -> dict[str, Any]:
        """Plain values for `search.json`."""
        done = self.relaxation
        return {
            "id": self.id,
            "status": self.status,
            "merged_into": self.merged_into,
            "basin": self.basin,
            "steps": None if done is None else done.steps,
            "energy_eV": self.energy,
            "start_energy_eV": self.start_energy,
            "max_force_eV_A": None if done is None else done.max_force_eV_A,
            "model_evaluations": 0 if done is None else done.model_evaluations,
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
        best: the lowest one; the lowest unconverged one where none has converged.
        coverage: estimate of what was not seen.
        reason: sentence about why the search ended.
        clean_slab: relaxed without the adsorbate.
        terms: eV; for a total-energy model `slab` and `gas`, which every energy has subtracted.
        gas: what was subtracted for the adsorbate, plain values; None for an adsorption-energy model.
        energy_kind: of the model.
        symmetry_operations: number of operations of the clean slab.
        model_evaluations: calls of the model for everything.
    """

    found: list[Found]
    best: Found
    coverage: Coverage
    reason: str
    clean_slab: Relaxation
    terms: dict[str, float]
    gas: dict[str, Any] | None
    energy_kind: str
    symmetry_operations: int
    model_evaluations: int

    @property
    def energy(self) -> float:
        """Adsorption energy of the best placement, eV."""
        assert self.best.energy is not None
        return self.best.energy

    def ranking(self) -> list[Found]:
        """The lowest placement of every basin, lowest first."""
        return sorted(
            (one for one in self.found if one.basin == one.id and one.energy is not None),
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

    Raises:
        InputError: no placement, placements on another slab, a folder of another search, no placement that
            has relaxed without an anomaly, and what the model refuses.
    """
    search = _Search(slab, placed, calculator, Path(folder), settings or SearchSettings(), identity or {})
    return search.run(clean_slab)


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
    ) -> None:
        if not placed:
            raise InputError("there is no placement to relax: every one was refused, or none was asked for")
        for name, atoms in placed:
            if not np.array_equal(atoms.numbers[: len(slab)], slab.numbers) or len(atoms) <= len(slab):
                raise InputError(f"the placement {name} is not an adsorbate on this slab")
        self.slab, self.folder, self.settings = slab, folder, settings
        self.calculator = calculator
        self.engine = open_engine(calculator)
        self.kind = resolve_energy_kind(calculator, self.engine.energy_kind)
        self.found = [Found(name, atoms) for name, atoms in placed]
        self.by_id = {one.id: one for one in self.found}
        if len(self.by_id) < len(placed):
            raise InputError("two placements have the same name: give each its own")
        self.adsorbate = placed[0][1][len(slab) :]
        check_gas_source(calculator, settings.gas, settings.gas_per_atom)
        if self.kind == "total":
            check_gas_references(self.adsorbate, settings.gas_per_atom, settings.gas)
        self.identity = {
            "model": self.engine.identity(),
            "slab": self._digest(),
            "adsorbate": self.adsorbate.get_chemical_formula(),
            "gas": settings.gas,
            "gas_per_atom": dict(settings.gas_per_atom),
            **identity,
        }
        self.evaluations = 0
        self.gas: dict[str, Any] | None = None

    def run(self, clean: Relaxation | None = None) -> SearchResult:
        """Relax in rounds, and stop by the rule."""
        with RelaxationStore(self.folder, self.identity) as store:
            if clean is None:
                # A model of adsorption energies has none for it; its geometry is what anomalies are found by.
                self.engine.energies_matter = self.kind == "total"
                (clean,) = self._relaxed(store, [(_CLEAN_SLAB, self.slab)])
                self.engine.energies_matter = True
            if clean.status == "failed" or clean.energy_eV is None:
                raise InputError(f"the clean slab cannot be relaxed: {clean.reason}")
            terms = self._terms(clean)
            symmetry = surface_symmetry(self.slab, clean.atoms)
            self._merge(surface_symmetry(self.slab))
            waiting = [one for one in self.found if one.merged_into is None]
            coverage = estimate_coverage([], [], len(self.found))
            reason = "all placements were relaxed"
            bar = tqdm(total=len(waiting), desc="relaxing", unit="placement", disable=None, leave=False)
            while waiting:
                now, waiting = waiting[:_ROUND], waiting[_ROUND:]
                starts = [(one.id, one.start) for one in now]
                for relaxation in self._relaxed(store, starts):
                    self._judge(self.by_id[relaxation.id], relaxation, clean.atoms, sum(terms.values()))
                    bar.update()
                coverage = self._coverage(symmetry)
                logger.info(self._progress(coverage, len(waiting)))
                if self.settings.stop and waiting and coverage.enough:
                    reason = (
                        f"a minimum 0.1 eV lower among the other {len(waiting)} starts has a probability of "
                        f"{coverage.p_lower:.1%}"
                    )
                    break
            bar.close()
        return SearchResult(
            self.found,
            self._best(),
            coverage,
            reason,
            clean,
            terms,
            self.gas,
            self.kind,
            len(symmetry),
            self.evaluations,
        )

    def _relaxed(self, store: RelaxationStore, starts: Sequence[tuple[str, Atoms]]) -> Iterator[Relaxation]:
        settings = self.settings.relaxation()
        for result in store.relax(starts, self.engine, settings, self.settings.batch_size):
            self.evaluations += result.model_evaluations
            yield result

    def _terms(self, clean: Relaxation) -> dict[str, float]:
        """Energies that every adsorption energy has subtracted; those of the gas are kept in the folder."""
        if self.kind == "adsorption":
            return dispersion_terms(self.calculator, clean.atoms, self.adsorbate)
        file = self.folder / _GAS
        if not file.exists():
            settings = {"optimizer": "LBFGS", "fmax": self.settings.fmax, "steps": self.settings.steps}
            gas = gas_reference(
                self.adsorbate, self.calculator, self.settings.gas_per_atom, self.settings.gas, settings
            )
            write_json(file, gas.summary() | {"converged": gas.converged})
        self.gas = read_json(file)
        return {"slab": float(clean.energy_eV or 0.0), "gas": float(self.gas["energy_eV"])}

    def _merge(self, symmetry: SurfaceSymmetry) -> None:
        """Mark placements that are copies of an earlier one under operations of the slab as it was cut."""
        adsorbates = [one.start[len(self.slab) :] for one in self.found]
        for one, first in zip(self.found, merge_copies(adsorbates, symmetry), strict=True):
            if self.found[first] is not one:
                one.status, one.merged_into = "merged", self.found[first].id

    def _judge(self, one: Found, relaxation: Relaxation, clean: Atoms, subtracted: float) -> None:
        """Note what became of a placement."""
        one.relaxation, one.status = relaxation, relaxation.status
        if relaxation.status == "stopped":  # by the spread of a committee
            one.status = "unconverged"
        if relaxation.energy_eV is None:
            return
        one.energy = relaxation.energy_eV - subtracted
        if relaxation.start_energy_eV is not None:
            one.start_energy = relaxation.start_energy_eV - subtracted
        if relaxation.status == "failed":
            return
        final = relaxation.atoms
        one.anomalies = check_anomalies(one.start, final, one.start.get_tags(), clean)
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
        """Find the basins anew, and estimate what is missing; copies count as often as they were placed."""
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
            [names[one.basin] for one in draws], [float(one.energy or 0.0) for one in draws], undone
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

    def _best(self) -> Found:
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
        counts = {
            status: sum(one.status == status for one in self.found) for status in ("anomalous", "failed")
        }
        kinds = Counter(rule.name for one in self.found for rule in one.anomalies if rule.present)
        listed = ", ".join(f"{number} {name}" for name, number in kinds.most_common())
        raise InputError(
            f"no placement has relaxed to the intended adsorbate: {counts['anomalous']} have an anomaly"
            + (f" ({listed})" if listed else "")
            + f", {counts['failed']} failed (see {self.folder / 'relaxed.jsonl'}); try more placements"
        )

    def _digest(self) -> str:
        """Hash what the slab is: elements, positions and cell to 1e-6 Å, periodic directions, held atoms."""
        digest = hashlib.sha256()
        for values in (self.slab.numbers, self.slab.pbc, fixed_mask(self.slab)):
            digest.update(np.ascontiguousarray(values).astype(np.int64).tobytes())
        for values in (self.slab.positions, self.slab.cell.array):
            digest.update(np.round(np.asarray(values) * 1e6).astype(np.int64).tobytes())
        return digest.hexdigest()

"""DFT results of the structures of a search: which they are of, and the ranking beside the model's."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr

from datasets_oc20.errors import DataError
from datasets_oc20.own_data.dft_settings import Settings
from datasets_oc20.own_data.reading import SourceFile
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.dft_inputs import Candidate
from equiformer2.adsorption.dft_ledger import CLEAN_SLAB_ID, Answer, now
from equiformer2.errors import InputError

#: Å; a DFT relaxation of a candidate begins at most so far from it (written and read back, or wrapped).
_SAME_START = 0.3
#: Å; a relaxation that goes on in another file begins at most so far from the end of the first.
_SAME_END = 0.05
#: Å; more than an atom moves in a step of a relaxation, so that another structure of the file may begin.
_JUMP = 0.5
#: eV/Å; OC20's relaxations end at 0.03, and usual ones at 0.05.
_RELAXED = 0.06
#: eV; two results of one structure are the same to so much.
_SAME_ENERGY = 1e-3
_SAME_CELL = 0.05  # Å


@dataclass(frozen=True)
class DftResult:
    """Output of DFT.

    Attributes:
        file: its name.
        frames: its structures, in order.
        usable: for each, True if its electronic steps have converged and it has an energy.
        settings: of the calculation, as far as the file tells them.
        problem: reason why a structure of it is not usable, or empty.
    """

    file: str
    frames: tuple[Atoms, ...]
    usable: tuple[bool, ...]
    settings: Settings = field(default_factory=dict)
    problem: str = ""

    @property
    def start(self) -> Atoms:
        """First structure."""
        return self.frames[0]

    @property
    def final(self) -> Atoms:
        """Last structure that is usable."""
        return [atoms for atoms, good in zip(self.frames, self.usable, strict=True) if good][-1]

    @property
    def energy(self) -> float:
        """Total energy of the last structure that is usable, eV."""
        return float(self.final.get_potential_energy(apply_constraint=False))


def read_dft_result(path: AnyPath) -> DftResult:
    """Read an output of DFT that ASE reads: OUTCAR, vasprun.xml, Quantum ESPRESSO, a trajectory, ….

    Raises:
        InputError: not readable, or no step with an energy has converged.
        OSError: the file is missing or unreadable.
    """
    frames, usable, problem = [], [], ""
    settings: Settings = {}
    try:
        source = SourceFile(path)
        for frame in source.frames():
            problem = frame.problem or problem
            if frame.atoms is not None:
                frames.append(frame.atoms)
                has_energy = frame.atoms.calc is not None and "energy" in frame.atoms.calc.results
                usable.append(has_energy and not frame.problem)
        settings = dict(source.calculation.settings)
    except DataError as error:  # what was read before it stands
        problem = str(error).removeprefix(f"{path}: ").rstrip(".")
    if not any(usable):
        raise InputError(f"{path} gives no DFT energy ({problem or 'it holds no structure with an energy'})")
    return DftResult(str(path), tuple(frames), tuple(usable), settings, problem)


def displacement(first: Atoms, second: Atoms) -> float:
    """Largest displacement of an atom, each matched to the nearest of its element, Å; infinite for others."""
    return match_atoms(first, second)[0]


def match_atoms(first: Atoms, second: Atoms) -> tuple[float, np.ndarray]:
    """Match atoms of two structures, whatever their order and the periodic image of each atom.

    Returns:
        Largest displacement, Å, infinite for other elements or another cell; and for every atom of `first`
        the index of its partner in `second`.
    """
    order = np.arange(len(first))
    if sorted(first.numbers) != sorted(second.numbers) or not _same_cell(first, second):
        return np.inf, order
    longest = 0.0
    for number in np.unique(first.numbers):
        mine, theirs = (np.flatnonzero(atoms.numbers == number) for atoms in (first, second))
        vectors = (second.positions[theirs][None] - first.positions[mine][:, None]).reshape(-1, 3)
        # Codes know periodic cells only, and some files say nothing of periodic directions.
        lengths = find_mic(vectors, first.cell.array, pbc=True)[1].reshape(len(mine), len(mine))
        rows, columns = linear_sum_assignment(lengths**2)
        order[mine[rows]] = theirs[columns]
        longest = max(longest, float(lengths[rows, columns].max()))
    return longest, order


def _same_cell(first: Atoms, second: Atoms) -> bool:
    return bool(np.allclose(first.cell.array, second.cell.array, atol=_SAME_CELL))


def match_results(
    structures: Sequence[Candidate], results: Iterable[DftResult], known: Iterable[Answer] = ()
) -> tuple[dict[str, Answer], list[tuple[str, str]]]:
    """Find what DFT results are of.

    A result belongs to the structure that it begins with. One that begins where another ends continues it,
    as a calculation does that is started again from its last structure. A file may hold several results.

    Args:
        structures: candidates and the clean slab (`CLEAN_SLAB_ID`).
        results: in any order.
        known: answers of earlier calls, which results may continue.

    Returns:
        Answers by id, and (file, reason) of the results that are of none of the structures.

    Raises:
        InputError: two results of one structure with other energies.
    """
    found: dict[str, Answer] = {}
    by_id = {one.id: one for one in structures}
    earlier = {answer.id: answer for answer in known if answer.id in by_id}
    waiting = [
        (part, *_nearest(part.start, structures)) for result in results for part in _parts(result, structures)
    ]
    refused = [
        (part.file, f"no step of it has an energy ({part.problem})")
        for part, *_ in waiting
        if not any(part.usable)
    ]
    waiting = [one for one in waiting if any(one[0].usable)]
    # First what begins at a structure itself: others near to it may go on from there.
    for limit in (_SAME_END, _SAME_START):
        place = 0
        while place < len(waiting):
            part, one, distance = waiting[place]
            ended = next(
                (
                    answer
                    for answer in {**earlier, **found}.values()
                    if distance > _SAME_END and displacement(part.start, answer.frames[-1]) < _SAME_END
                ),
                None,
            )
            if ended is not None:
                found[ended.id] = _continued(ended, _answer(by_id[ended.id], part))
            elif one is not None and distance < limit:
                _add(found, _answer(one, part))
            else:
                place += 1
                continue
            del waiting[place]
            place = 0  # others may continue this one
    refused += [(part.file, _reason(part, structures, one, distance)) for part, one, distance in waiting]
    return found, refused


def _continued(answer: Answer, more: Answer) -> Answer:
    return replace(more, files=(*answer.files, *more.files), frames=[*answer.frames, *more.frames])


def _parts(result: DftResult, structures: Sequence[Candidate]) -> Iterator[DftResult]:
    """Divide the frames of a file where another structure of the search begins."""
    if "code" in result.settings:  # an output of one calculation
        yield result
        return
    begin, current = 0, _nearest(result.start, structures)[0]
    for place in range(1, len(result.frames)):
        before, after = result.frames[place - 1 : place + 1]
        same = np.array_equal(before.numbers, after.numbers) and _same_cell(before, after)
        if same:
            moved = find_mic(after.positions - before.positions, after.cell.array, pbc=True)[1].max()
            if moved < _JUMP:
                continue
            nearest, distance = _nearest(after, structures)
            if distance > _SAME_START or nearest is current:
                continue
        yield replace(result, frames=result.frames[begin:place], usable=result.usable[begin:place])
        begin, current = place, _nearest(after, structures)[0]
    yield replace(result, frames=result.frames[begin:], usable=result.usable[begin:])


def _nearest(atoms: Atoms, structures: Sequence[Candidate]) -> tuple[Candidate | None, float]:
    """Nearest structure, and its distance in Å; None where all have other atoms or cells."""
    distances = [displacement(atoms, one.atoms) for one in structures]
    place = int(np.argmin(distances))
    return (structures[place] if np.isfinite(distances[place]) else None), distances[place]


def _reason(
    result: DftResult, structures: Sequence[Candidate], one: Candidate | None, distance: float
) -> str:
    if one is not None:
        return f"it begins {distance:.2f} Å from the nearest structure of this search ({one.id})"
    alike = [one for one in structures if sorted(one.atoms.numbers) == sorted(result.start.numbers)]
    if alike:
        lengths = (
            " x ".join(f"{edge:.2f}" for edge in atoms.cell.lengths())
            for atoms in (result.start, alike[0].atoms)
        )
        return "its cell is another ({} Å, in this search {} Å)".format(*lengths)
    formulas = sorted({one.atoms.get_chemical_formula() for one in structures})
    own = result.start.get_chemical_formula()
    return f"its atoms are others ({own}, in this search {' and '.join(formulas)})"


def _answer(one: Candidate, result: DftResult) -> Answer:
    """Bring the usable frames of a result into the order of a structure, with its tags and held atoms."""
    order = match_atoms(one.atoms, result.start)[1]
    frames = []
    for atoms, good in zip(result.frames, result.usable, strict=True):
        if not good:
            continue
        frame = one.atoms.copy()
        frame.info = {}
        frame.set_cell(atoms.cell)
        frame.set_positions(atoms.positions[order], apply_constraint=False)
        values: dict[str, Any] = {"energy": float(atoms.get_potential_energy(apply_constraint=False))}
        if atoms.calc.results.get("forces") is not None:
            values["forces"] = np.asarray(atoms.calc.results["forces"])[order]
        frame.calc = SinglePointCalculator(frame, **values)
        frames.append(frame)
    return Answer(one.id, (result.file,), frames, result.settings, now(), result.problem)


def _add(found: dict[str, Answer], answer: Answer) -> None:
    """Keep an answer; of two with the same energy the one with more frames.

    Raises:
        InputError: the other result of the structure has another energy.
    """
    known = found.get(answer.id)
    if known is None:
        found[answer.id] = answer
        return
    check_agree(known, answer)
    if len(answer.frames) > len(known.frames):
        found[answer.id] = answer


def check_agree(known: Answer, answer: Answer, remedy: str = "give one of them") -> None:
    """Raise `InputError` where two results of one structure differ by more than 1 meV."""
    difference = abs(known.energy - answer.energy)
    if difference > _SAME_ENERGY:
        name = "clean slab" if answer.id == CLEAN_SLAB_ID else f"candidate {answer.id}"
        raise InputError(
            f"{known.files[-1]} and {answer.files[-1]} are both of the {name}, with energies that differ by "
            f"{difference:.3f} eV: {remedy}"
        )


def collect(
    candidates: Sequence[Candidate],
    clean_slab: Atoms,
    results: Sequence[DftResult],
    gas_per_atom: Mapping[str, float] | None = None,
    adsorbate: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare DFT energies with those of the model, see `compare`.

    Args:
        candidates: of the search, relaxed by the model, with adsorption energies.
        clean_slab: relaxed by the model.
        results: of candidates, in any order, and perhaps one of the clean slab.
        gas_per_atom, adsorbate: see `compare`.

    Raises:
        InputError: a result of another structure, two results of one structure with other energies, no result
            of a candidate, a gas reference missing.
    """
    answers, refused = match_results(with_clean_slab(candidates, clean_slab), results)
    if refused:
        file, reason = refused[0]
        raise InputError(f"{file} is not of a structure of this search: {reason}")
    return compare(candidates, answers, gas_per_atom, adsorbate)


def with_clean_slab(candidates: Sequence[Candidate], clean_slab: Atoms) -> list[Candidate]:
    """Candidates and the clean slab, as `match_results` takes them."""
    return [Candidate(CLEAN_SLAB_ID, clean_slab, None), *candidates]


def compare(
    candidates: Sequence[Candidate],
    answers: Mapping[str, Answer],
    gas_per_atom: Mapping[str, float] | None = None,
    adsorbate: Sequence[str] = (),
) -> dict[str, Any]:
    """Rank by DFT, and say whether the model's ranking held.

    Args:
        candidates: of the search, relaxed by the model, with adsorption energies.
        answers: by id.
        gas_per_atom: DFT energies per atom of the gas references, eV; with these and an answer of the clean
            slab DFT gives adsorption energies, too.
        adsorbate: symbols of its atoms.

    Returns:
        Plain values: `ranking` by DFT's energy (`id`, `model_eV`, `dft_eV`, `file`, `steps`,
        `max_force_eV_A`, `moved_A` by DFT, `ended_at`: another candidate that DFT ended at, `in_correction`:
        it is part of the correction), `dft_energy`
        (`adsorption` or `total`: what `dft_eV` is), `correction_eV` (mean of `dft_eV - model_eV`, to be added
        to the model's energies of this adsorbate on this slab) and `correction_std_eV`, `spearman` (None for
        fewer than two), `top1_held` (the model's lowest candidate is DFT's lowest; None unless it and another
        have a result), `reranked` (every candidate, by DFT or by the model with the correction) and
        `warnings`. Structures that the model has not relaxed to the end count for the last three only where
        there are no others.

    Raises:
        InputError: no answer of a candidate, or a gas reference is missing.
    """
    by_id = {one.id: one for one in candidates}
    given = {name: answer for name, answer in answers.items() if name in by_id}
    if not given:
        raise InputError("no DFT result is of a candidate of this search: give outputs of its dft folders")
    reference = dft_reference(answers, gas_per_atom, adsorbate)
    ranking: list[dict[str, Any]] = []
    for name, answer in given.items():
        moved = displacement(answer.frames[-1], by_id[name].atoms)
        nearest, distance = _nearest(answer.frames[-1], candidates)
        elsewhere = moved > _SAME_START and nearest is not None and distance < _SAME_START
        ranking.append(
            {
                "id": name,
                "model_eV": by_id[name].energy,
                "dft_eV": answer.energy - (reference or 0.0),
                "file": answer.files[-1],
                "steps": len(answer.frames) - 1,
                "max_force_eV_A": answer.max_force,
                "moved_A": moved,
                "ended_at": nearest.id if elsewhere and nearest is not None else None,
            }
        )
    ranking.sort(key=lambda row: float(row["dft_eV"]))
    minima = [row for row in ranking if by_id[row["id"]].is_minimum] or ranking
    pairs = np.array([[row["model_eV"], row["dft_eV"]] for row in minima], dtype=float)
    offset = pairs[:, 1] - pairs[:, 0]
    several = len(minima) > 1
    lowest = min(
        candidates, key=lambda one: (not one.is_minimum, np.inf if one.energy is None else one.energy)
    ).id
    known = {row["id"] for row in minima}
    for row in ranking:
        row["in_correction"] = row["id"] in known
    dft = {row["id"]: row["dft_eV"] for row in ranking}
    reranked = [
        {"id": one.id, "energy_eV": dft[one.id], "from": "dft"}
        if one.id in dft
        else {"id": one.id, "energy_eV": one.energy + float(offset.mean()), "from": "model and correction"}
        for one in candidates
        if one.energy is not None
    ]
    return {
        "ranking": ranking,
        "dft_energy": "total" if reference is None else "adsorption",
        "correction_eV": float(offset.mean()),
        "correction_std_eV": float(offset.std(ddof=1)) if several else None,
        # Of a constant column there is no rank.
        "spearman": float(spearmanr(*pairs.T).statistic) if several and np.ptp(pairs, axis=0).all() else None,
        "top1_held": minima[0]["id"] == lowest if several and lowest in known else None,
        "reranked": sorted(reranked, key=lambda row: float(row["energy_eV"])),
        "warnings": [
            *(
                f"{one.files[-1]}: {one.problem}; its last good step counts"
                for one in answers.values()
                if one.problem
            ),
            *_warnings(ranking, answers.get(CLEAN_SLAB_ID)),
        ],
    }


def dft_reference(
    answers: Mapping[str, Answer], gas_per_atom: Mapping[str, float] | None, adsorbate: Sequence[str]
) -> float | None:
    """DFT energy of clean slab and gas, eV; None where DFT gives total energies only.

    Raises:
        InputError: a gas reference is missing.
    """
    slab = answers.get(CLEAN_SLAB_ID)
    if slab is None or not gas_per_atom:
        return None
    missing = sorted(set(adsorbate) - set(gas_per_atom))
    if missing:
        raise InputError(f"there is no gas reference for {', '.join(missing)}: give one per element")
    return slab.energy + sum(gas_per_atom[symbol] for symbol in adsorbate)


def _warnings(ranking: Sequence[Mapping[str, Any]], slab: Answer | None) -> list[str]:
    """Say where DFT's energies are not what a ranking of minima takes."""
    found = [
        f"DFT has moved {row['id']} by {row['moved_A']:.2f} Å"
        + (f", into the minimum of {row['ended_at']}" if row["ended_at"] else "")
        for row in ranking
        if row["moved_A"] > _SAME_START
    ]
    rows = [*ranking]
    if slab is not None:
        rows.append({"id": "the clean slab", "steps": len(slab.frames) - 1, "max_force_eV_A": slab.max_force})
    # A relaxation that begins in DFT's own minimum ends at its first step.
    single = [
        row["id"]
        for row in rows
        if row["steps"] == 0 and (row["max_force_eV_A"] is None or row["max_force_eV_A"] > _RELAXED)
    ]
    if single and len(single) < len(rows):
        found.append(
            f"single points ({', '.join(single)}) stand beside relaxations: their energies are too high "
            "in comparison"
        )
    unfinished = [
        f"{row['id']} ({row['max_force_eV_A']:.2f} eV/Å)"
        for row in rows
        if row["steps"] and row["max_force_eV_A"] is not None and row["max_force_eV_A"] > _RELAXED
    ]
    if unfinished:
        found.append(f"relaxations have not ended: {', '.join(unfinished)}; their energies may still fall")
    return found

"""Checks of imported frames against each other: settings, units, kinds of energy, duplicates, outliers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from datasets_oc20.errors import DataError
from datasets_oc20.own_data.dft_settings import Settings
from datasets_oc20.own_data.frame_facts import FrameFacts
from datasets_oc20.own_data.labels import ENERGY_UNITS, FORCE_UNITS
from datasets_oc20.own_data.source_worker import SourceResult

MAX_FORCE = 50.0
"""eV/Å; frames with a larger force are listed, as OC20 leaves them out."""
_MATCH = 0.12
"""Relative deviation within which a factor is that of a unit."""
_AGREES = (0.7, 1.4)
_AGREEMENT = 0.6
"""Share of the steps (by size) that must give nearly the same factor, before it is believed."""
_FEWEST_STEPS = 3
_SAME = 2e-5
"""Largest difference of equal signatures: some 1e-5 Å of every atom, as outputs of codes are rounded."""
_OUTLIER_WIDTHS = 6.0
_SMALLEST_OUTLIER = 0.1
"""eV per atom off the linear fit, below which a frame is no outlier."""
_NEAR_ZERO_PER_ATOM, _TOTAL_PER_ATOM, _KINDS_APART = 0.3, 1.5, 10.0
"""eV per atom below and above which energies of large structures are not of one kind, and their ratio."""
_FEWEST_OF_A_KIND = 4
_SMALLEST_BODY = 8
"""Atoms; isolated atoms and small molecules may have any energy per atom."""


@dataclass(frozen=True)
class Place:
    """A frame and its file."""

    file: str
    facts: FrameFacts

    def __str__(self) -> str:
        return f"{self.file}, frame {self.facts.index}"


def places(results: Iterable[SourceResult]) -> list[Place]:
    """List all frames with their files."""
    return [Place(result.file, facts) for result in results for facts in result.frames]


def different_settings(results: Iterable[SourceResult]) -> list[str]:
    """Compare the settings of calculations with usable frames, see `differences`."""
    return differences(
        (result.file if index is None else f"{result.file}, frame {index}", settings)
        for result in results
        if result.frames
        for index, settings in ((None, result.calculation.settings), *result.calculation.others)
    )


def differences(settings: Iterable[tuple[str, Settings]]) -> list[str]:
    """Compare the settings of files; one sentence part for each setting that differs.

    Settings that only one of two files tells, such as +U of an element that the other has not, do not differ.

    Args:
        settings: name of a file, and its settings.
    """
    first: dict[str, tuple[str | float, str]] = {}
    found: dict[str, str] = {}
    for file, table in settings:
        for name, value in table.items():
            known, other = first.setdefault(name, (value, file))
            both = isinstance(known, float) and isinstance(value, float)
            same = np.isclose(known, value, rtol=1e-4) if both else known == value
            if not same and name not in found:
                found[name] = f"{name} is {_shown(known)} in {other} and {_shown(value)} in {file}"
    order = ("code", "functional", "cut-off (eV)")
    names = [name for name in order if name in found] + [name for name in found if name not in order]
    return [found[name] for name in names]


def _shown(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) else value


def unit_problem(result: SourceResult) -> tuple[int, str, bool] | None:
    """Compare the differences in energy along the trajectories of a source with its forces.

    Returns:
        Number of the first frame that tells, a sentence part that names the factor, and True if it is the
        factor of a unit; None where energies and forces belong together or too few frames tell.
    """
    steps = [(facts, *facts.step) for facts in result.frames if facts.step is not None]
    if len(steps) < _FEWEST_STEPS:
        return None
    energy = np.array([step[1] for step in steps])
    expected = np.array([step[2] for step in steps])
    used = np.abs(expected) > 0.1 * np.median(np.abs(expected))
    if used.sum() < _FEWEST_STEPS or not np.abs(energy[used]).max() > 0:
        return None
    ratios, weights = energy[used] / expected[used], np.abs(expected[used])
    order = np.argsort(ratios)
    middle = np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)
    factor = float(ratios[order][middle])
    agreeing = weights[np.abs(ratios - factor) < 0.2 * abs(factor)].sum() / weights.sum()
    if _AGREES[0] < factor < _AGREES[1] or agreeing < _AGREEMENT or factor == 0:
        return None
    facts = next(step[0] for step, tells in zip(steps, used, strict=True) if tells)
    told = f"energies change along the trajectory by {factor:.4g} times what the forces give"
    meanings = _meanings(factor, facts.natoms)
    if not meanings:
        return facts.index, f"{told}; check the units of both", False
    return facts.index, f"{told}, {' or '.join(meanings)}", True


def _meanings(factor: float, natoms: int) -> list[str]:
    """Name the units, or the sign, that a factor between energies and forces means."""

    def matches(expected: float) -> bool:
        return abs(factor / expected - 1) < _MATCH

    found = []
    if natoms > 1 and matches(1 / natoms):
        found.append(f"as if they were energies per atom (of {natoms}), not of the structure")
    for name, unit in FORCE_UNITS.items():
        if name != "eV/A" and matches(unit):
            found.append(f"as if forces were in {name} (--forces-unit {name})")
    for name, unit in ENERGY_UNITS.items():
        if name != "eV" and matches(1 / unit):
            found.append(f"as if energies were in {name} (--energy-unit {name})")
    if matches(-1.0):
        found.append("as if they were gradients, of the opposite sign")
    if matches(FORCE_UNITS["Ha/bohr"] / ENERGY_UNITS["Ha"]):
        found.append(
            "as if energies were in Ha and forces in Ha/bohr (--energy-unit Ha --forces-unit Ha/bohr)"
        )
    return found


def check_one_kind(frames: Sequence[Place]) -> None:
    """Check that energies are of one kind and of whole structures.

    Raises:
        DataError: the same atoms have energies of different kinds, or energies do not grow with the size of a
            structure, as energies per atom do.
    """
    by_atoms: dict[bytes, list[Place]] = {}
    for place in frames:
        by_atoms.setdefault(place.facts.atoms_digest, []).append(place)
    for same in by_atoms.values():
        sizes = np.array([abs(place.facts.energy) for place in same])
        natoms = same[0].facts.natoms
        small, large = same[int(sizes.argmin())], same[int(sizes.argmax())]
        apart = sizes.max() > 5 * sizes.min() and sizes.max() - sizes.min() > max(10.0, natoms)
        many_small = (sizes**2 < sizes.min() * sizes.max()).sum() >= _FEWEST_OF_A_KIND
        one_large = (sizes**2 > sizes.min() * sizes.max()).sum() == 1
        if natoms == 1 or not apart or (many_small and one_large):  # one among many is an outlier
            continue
        per_atom = abs(sizes.max() / natoms - sizes.min()) < 0.1 * sizes.min()
        reason = f"the first is the second divided by {natoms} atoms" if per_atom else "of two kinds"
        raise DataError(
            f"{small} has {small.facts.energy:.6g} eV and {large} with the same atoms "
            f"{large.facts.energy:.6g} eV: {reason}; import them apart, or give --mixed."
        )
    bodies = [place for place in frames if place.facts.natoms >= _SMALLEST_BODY]
    if len(bodies) < 2:
        return
    per_atom_energy = np.array([abs(place.facts.energy) / place.facts.natoms for place in bodies])
    near_zero, total = per_atom_energy < _NEAR_ZERO_PER_ATOM, per_atom_energy > _TOTAL_PER_ATOM
    is_outlier = total.sum() == 1 and near_zero.sum() >= _FEWEST_OF_A_KIND
    if near_zero.any() and total.any() and not is_outlier:
        apart = np.median(per_atom_energy[total]) / max(float(np.median(per_atom_energy[near_zero])), 1e-9)
        if apart > _KINDS_APART:
            small, large = bodies[int(near_zero.argmax())], bodies[int(total.argmax())]
            raise DataError(
                f"{small} has {small.facts.energy:.6g} eV for {small.facts.natoms} atoms and {large} "
                f"{large.facts.energy:.6g} eV for {large.facts.natoms}: these are two kinds of energy "
                "(adsorption energies or energies per atom among total energies); import them apart, or give "
                "--mixed."
            )
    _check_grows_with_size(bodies)


def _check_grows_with_size(frames: Sequence[Place]) -> None:
    """Raise `DataError` if energies follow from the ratio of the elements alone, whatever the size."""
    sizes = np.array([place.facts.natoms for place in frames])
    if sizes.max() < 1.5 * sizes.min() or len(frames) < 3:
        return
    counts, energy = _element_counts(frames)
    kinds = len(np.unique(np.round(counts / sizes[:, None], 6), axis=0))
    ratios = len(np.unique(counts, axis=0))
    if ratios <= kinds or ratios <= counts.shape[1]:  # every composition has one size: nothing to compare
        return

    def spread(table: np.ndarray) -> float:
        fitted = table @ np.linalg.lstsq(table, energy, rcond=None)[0]
        return float(np.sqrt(np.mean((energy - fitted) ** 2)))

    if spread(counts / sizes[:, None]) < 0.1 * spread(counts):
        first = frames[0]
        raise DataError(
            f"{first} has {first.facts.energy:.6g} eV for {first.facts.natoms} atoms, and energies of other "
            f"sizes ({sizes.min()} to {sizes.max()} atoms) are alike: they are per atom; multiply each by "
            f"its number of atoms (a factor of {first.facts.natoms} here), or give --mixed."
        )


def _element_counts(frames: Sequence[Place]) -> tuple[np.ndarray, np.ndarray]:
    """Return atoms per element, `[n, elements]`, and energies, `[n]` eV."""
    elements = sorted({number for place in frames for number, _ in place.facts.composition})
    column = {number: place for place, number in enumerate(elements)}
    counts = np.zeros((len(frames), len(elements)))
    for row, place in enumerate(frames):
        for number, atoms in place.facts.composition:
            counts[row, column[number]] = atoms
    return counts, np.array([place.facts.energy for place in frames])


def energy_outliers(frames: Sequence[Place]) -> list[tuple[Place, float]]:
    """Find frames whose energies are far off a linear fit by composition, with the distance in eV per atom.

    Isolated atoms are left out. The fit is repeated without what it finds. What is far is measured by the
    distances of compositions, of which a trajectory has one, however many frames it has.
    """
    frames = [place for place in frames if place.facts.natoms > 1]
    if len(frames) < 5:
        return []
    counts, energy = _element_counts(frames)
    natoms = counts.sum(axis=1)
    _, composition = np.unique(counts, axis=0, return_inverse=True)
    composition = composition.reshape(-1)
    inside = np.ones(len(frames), dtype=bool)
    distance = np.zeros(len(frames))
    for _ in range(3):
        table = (counts / natoms[:, None])[inside]
        references = np.linalg.lstsq(table, (energy / natoms)[inside], rcond=None)[0]
        distance = (energy - counts @ references) / natoms
        middle = np.median(distance[inside])
        away = np.abs(distance - middle)
        of_compositions = [
            np.median(away[inside & (composition == kind)]) for kind in np.unique(composition[inside])
        ]
        width = 1.4826 * max(np.median(of_compositions), np.median(away[inside]))
        limit = max(_OUTLIER_WIDTHS * width, _SMALLEST_OUTLIER)
        found = away > limit
        if np.array_equal(~found, inside) or found.sum() > 0.5 * len(frames):
            break
        inside = ~found
    outside = np.flatnonzero(found)
    if len(outside) > 0.5 * len(frames):
        return []
    return [(frames[row], float(distance[row])) for row in outside.tolist()]


def duplicates(frames: Sequence[Place]) -> list[tuple[Place, Place, float]]:
    """Find the same structures twice: each later frame, the first that it equals, the energy between (eV)."""
    by_atoms: dict[bytes, list[int]] = {}
    for number, place in enumerate(frames):
        by_atoms.setdefault(place.facts.atoms_digest, []).append(number)
    pairs: list[tuple[int, int]] = []
    for numbers in by_atoms.values():
        if len(numbers) < 2:
            continue
        signatures = np.array([frames[number].facts.signature for number in numbers])
        # Exact copies first, so that a thousand of them are not a million pairs.
        _, first, copy_of = np.unique(np.round(signatures, 9), axis=0, return_index=True, return_inverse=True)
        equal = first[copy_of.reshape(-1)]
        near: dict[int, int] = {}
        for one, other in cKDTree(signatures[first]).query_pairs(_SAME, p=np.inf):
            earlier, later = sorted((int(first[one]), int(first[other])))
            near[later] = min(earlier, near.get(later, earlier))
        for row, number in enumerate(numbers):
            original = int(equal[row])
            original = original if original != row else near.get(row, row)
            if original != row:
                pairs.append((number, numbers[original]))
    return [
        (frames[later], frames[first], frames[later].facts.energy - frames[first].facts.energy)
        for later, first in sorted(pairs)
    ]

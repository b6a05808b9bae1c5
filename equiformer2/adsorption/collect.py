"""DFT results of the candidates of a search, beside the model's energies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr

from datasets_oc20.errors import DataError
from datasets_oc20.own_data.reading import SourceFile
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.dft_inputs import Candidate
from equiformer2.errors import InputError

#: Å; a DFT relaxation of a candidate begins at most so far from it (written and read back, or wrapped).
_SAME_START = 0.3


@dataclass(frozen=True)
class DftResult:
    """Energy of one DFT calculation.

    Attributes:
        file: its output.
        start: first structure.
        final: last structure whose electronic steps have converged.
        energy: of it, eV.
    """

    file: str
    start: Atoms
    final: Atoms
    energy: float


def read_dft_result(path: AnyPath) -> DftResult:
    """Read an output of DFT that ASE reads: OUTCAR, vasprun.xml, Quantum ESPRESSO, a trajectory, ….

    Raises:
        InputError: not readable, or no step with an energy has converged.
        OSError: the file is missing or unreadable.
    """
    start = final = None
    problem = "it holds no structure with an energy"
    try:
        for frame in SourceFile(path).frames():
            if frame.atoms is not None:
                start = frame.atoms if start is None else start
            if frame.problem or frame.atoms is None:
                problem = frame.problem or problem
                continue
            if frame.atoms.calc is not None and "energy" in frame.atoms.calc.results:
                final = frame.atoms
    except DataError as error:  # what was read before it stands
        problem = str(error).rstrip(".")
    if start is None or final is None:
        raise InputError(f"{path} gives no DFT energy ({problem})")
    return DftResult(str(path), start, final, float(final.get_potential_energy(apply_constraint=False)))


def displacement(first: Atoms, second: Atoms) -> float:
    """Largest displacement of an atom, each matched to the nearest of its element, Å; infinite for others."""
    if sorted(first.numbers) != sorted(second.numbers) or not np.allclose(
        first.cell.array, second.cell.array, atol=0.05
    ):
        return np.inf
    longest = 0.0
    for number in np.unique(first.numbers):
        mine, theirs = (atoms.positions[atoms.numbers == number] for atoms in (first, second))
        vectors = (theirs[None] - mine[:, None]).reshape(-1, 3)
        lengths = find_mic(vectors, first.cell.array, first.pbc)[1].reshape(len(mine), len(mine))
        rows, columns = linear_sum_assignment(lengths**2)
        longest = max(longest, float(lengths[rows, columns].max()))
    return longest


def collect(
    candidates: Sequence[Candidate],
    clean_slab: Atoms,
    results: Sequence[DftResult],
    gas_per_atom: Mapping[str, float] | None = None,
    adsorbate: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare DFT energies with those of the model.

    Args:
        candidates: of the search, relaxed by the model, with adsorption energies.
        clean_slab: relaxed by the model.
        results: of candidates, in any order, and perhaps one of the clean slab.
        gas_per_atom: DFT energies per atom of the gas references, eV; with these and a result of the clean
            slab DFT gives adsorption energies, too.
        adsorbate: symbols of its atoms.

    Returns:
        Plain values: `ranking` by DFT's energy (`id`, `model_eV`, `dft_eV`, `file`), `dft_energy`
        (`adsorption` or `total`: what `dft_eV` is), `correction_eV` (mean of `dft_eV - model_eV`, to be added
        to the model's energies of this adsorbate on this slab) and `correction_std_eV`, `spearman` (None for
        fewer than two), `top1_held` (the model's lowest candidate is DFT's lowest; None unless it and another
        have a result).

    Raises:
        InputError: a result of another structure, two results of one structure with other energies, no result
            of a candidate, a gas reference missing.
    """
    energies: dict[str, DftResult] = {}
    slab: DftResult | None = None
    for result in results:
        if displacement(result.start, clean_slab) < _SAME_START:
            _check_agree("clean slab", slab, result)
            slab = result
            continue
        found = min(candidates, key=lambda one: displacement(result.start, one.atoms))
        distance = displacement(result.start, found.atoms)
        if distance > _SAME_START:
            raise InputError(
                f"{result.file} is not of a structure of this search: "
                + (
                    "its atoms or its cell are others"
                    if not np.isfinite(distance)
                    else f"it begins {distance:.2f} Å from the nearest candidate ({found.id})"
                )
            )
        _check_agree(f"candidate {found.id}", energies.get(found.id), result)
        energies[found.id] = result
    if not energies:
        raise InputError("no DFT result is of a candidate of this search: give outputs of its dft folders")
    reference = 0.0
    is_adsorption = slab is not None and bool(gas_per_atom)
    if is_adsorption:
        assert slab is not None
        assert gas_per_atom is not None
        missing = sorted(set(adsorbate) - set(gas_per_atom))
        if missing:
            raise InputError(f"there is no gas reference for {', '.join(missing)}: give one per element")
        reference = slab.energy + sum(gas_per_atom[symbol] for symbol in adsorbate)
    model = {one.id: one.energy for one in candidates}
    ranking: list[dict[str, Any]] = [
        {"id": name, "model_eV": model[name], "dft_eV": result.energy - reference, "file": result.file}
        for name, result in energies.items()
    ]
    ranking.sort(key=lambda row: float(row["dft_eV"]))
    pairs = np.array([[row["model_eV"], row["dft_eV"]] for row in ranking], dtype=float)
    offset = pairs[:, 1] - pairs[:, 0]
    several = len(ranking) > 1
    lowest = min(candidates, key=lambda one: np.inf if one.energy is None else one.energy).id
    return {
        "ranking": ranking,
        "dft_energy": "adsorption" if is_adsorption else "total",
        "correction_eV": float(offset.mean()),
        "correction_std_eV": float(offset.std(ddof=1)) if several else None,
        # Of a constant column there is no rank.
        "spearman": float(spearmanr(*pairs.T).statistic) if several and np.ptp(pairs, axis=0).all() else None,
        "top1_held": ranking[0]["id"] == lowest if several and lowest in energies else None,
    }


def _check_agree(structure: str, known: DftResult | None, result: DftResult) -> None:
    """Raise `InputError` where two results of one structure differ by more than 1 meV."""
    if known is not None and abs(known.energy - result.energy) > 1e-3:
        raise InputError(
            f"{known.file} and {result.file} are both of the {structure}, with energies that differ by "
            f"{abs(known.energy - result.energy):.3f} eV: give one of them"
        )

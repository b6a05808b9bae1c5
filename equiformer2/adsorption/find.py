"""`find_adsorption_energy`: from a slab and an adsorbate to the lowest adsorption energy, in one call."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.energy import resolve_energy_kind
from equiformer2.adsorption.placements import placements as make_placements
from equiformer2.adsorption.search import SearchResult, SearchSettings, search_placements
from equiformer2.adsorption.search_output import CARD, SEARCH, write_search
from equiformer2.adsorption.slabs import find_slab
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json
from equiformer2.inference.calculator import EquiformerV2Calculator
from equiformer2.inference.committee import Model
from equiformer2.inference.engines import calculator_identity
from equiformer2.inference.many import Relaxation
from equiformer2.inference.record import model_record
from equiformer2.shipped import find_checkpoint


@dataclass(frozen=True)
class FoundEnergy:
    """Adsorption energy that a search has found.

    Attributes:
        energy: eV.
        energy_kind: what the model predicts, `"adsorption"` or `"total"`.
        converged: whether the best placement has converged.
        best: relaxed structure of the best placement, with the model's energy and forces.
        placements: rows of `search.json`, one per placement.
        card: trust card.
        record: content of `search.json`.
        search: the search itself, with all structures.
    """

    energy: float
    energy_kind: str
    converged: bool
    best: Atoms
    placements: list[dict[str, Any]]
    card: dict[str, Any]
    record: dict[str, Any]
    search: SearchResult


def find_adsorption_energy(
    slab: Atoms | str,
    adsorbate: str | Atoms,
    calculator: BaseCalculator | Model,
    *,
    placements: int | None = 40,
    mode: str = "heuristic",
    seed: int = 0,
    positions: Sequence[tuple[float, float]] | None = None,
    height: float | None = None,
    fmax: float = 0.05,
    steps: int = 300,
    stop: bool = True,
    gas: str = "vacuum",
    gas_per_atom: Mapping[str, float] | None = None,
    out: AnyPath | None = None,
    overwrite: bool = False,
    describe: Callable[[list[Atoms]], dict[str, Any]] | None = None,
    notes: Mapping[str, Any] | None = None,
    clean_slab: Relaxation | None = None,
) -> FoundEnergy:
    """Find the lowest adsorption energy of an adsorbate on a slab.

    Args:
        slab: clean slab, whose held atoms stay held, or what `find_slab` takes (`Pt111`, a file).
        adsorbate: name (`*CO`, `CH3OH`, …), file or structure.
        calculator: any ASE calculator, or a network: a path, the name of a shipped model, a `Predictor`.
        placements: number of placements at most; None places one at each of the sites or positions.
        mode: how they are made, see `equiformer2.adsorption.placements.placements`.
        seed: random seed of the placements.
        positions: x and y of the binding atom, Å, for the mode `positions`.
        height: Å of the binding atom above the highest slab atom at every position; in contact if None.
        fmax: eV/Å; a relaxation has converged when no force on a free atom reaches it.
        steps: most steps of a relaxation.
        stop: stop before all placements are relaxed where a lower minimum is unlikely.
        gas: source of the gas references of a total-energy model (`references.gas_reference`).
        gas_per_atom: eV per atom, instead of it.
        out: folder for all files; the same call continues a stopped search. None keeps nothing.
        overwrite: write the results of a finished search again; finished relaxations are kept.
        describe: gives plain values about the model for the records, from states of the structure.
        notes: plain values about how the slab was made, for the records.
        clean_slab: relaxed by the same model with the same settings, such as an earlier search's.

    Raises:
        InputError: no adsorbate or placement of that kind, a folder of another search or a finished one, and
            what the model refuses.
    """
    if isinstance(slab, str):
        slab = find_slab(slab).atoms
    model: Any = calculator
    if not isinstance(calculator, BaseCalculator):
        calculator = EquiformerV2Calculator(calculator)
    kind = resolve_energy_kind(calculator)
    cutoff = None
    if isinstance(calculator, EquiformerV2Calculator):
        cutoff = calculator.predictor.checkpoint.config.max_radius
    starts = make_placements(
        slab, adsorbate, mode, placements, seed, positions=positions, height=height, cutoff=cutoff
    )
    settings = SearchSettings(fmax, steps, stop, gas, dict(gas_per_atom or {}))
    placed = {
        "mode": mode,
        "placements": placements,
        "seed": seed,
        "left_out": starts.reasons(),
    }
    if positions is not None:
        placed |= {"positions_A": [list(map(float, xy)) for xy in positions], "height_A": height}
    with ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(out)
            check_target(folder, is_folder=True)
            if (folder / SEARCH).exists() and not overwrite:
                raise InputError(
                    f"{folder} holds a finished search ({SEARCH}): give another folder, or --overwrite"
                )
        result = search_placements(
            slab,
            [(one.id, one.atoms) for one in starts],
            calculator,
            folder,
            settings,
            placed,
            clean_slab=clean_slab,
        )
        assert result.best.relaxation is not None
        best = result.best.relaxation.atoms
        told = {**placed, "fmax_eV_A": fmax, "steps": steps, "stop": stop, **(notes or {})}
        states = [result.best.start, best]
        record_of_model = describe(states) if describe else _described(calculator, model, states)
        provenance = None
        if isinstance(calculator, EquiformerV2Calculator):
            provenance = calculator.predictor.checkpoint.provenance
        record = write_search(folder, result, record_of_model, told, provenance)
        card = read_json(folder / CARD)
    return FoundEnergy(
        energy=result.energy,
        energy_kind=kind,
        converged=record["converged"],
        best=best,
        placements=record["placements"],
        card=card,
        record=record,
        search=result,
    )


def _described(calculator: BaseCalculator, model: Any, states: list[Atoms]) -> dict[str, Any]:
    """Plain values about a model that was given in Python, for records."""
    if not isinstance(calculator, EquiformerV2Calculator):
        return {"checkpoint": None, **calculator_identity(calculator)}
    path: str | list[str] | None = None
    if isinstance(model, str | os.PathLike):
        path = str(find_checkpoint(model))
    return {**model_record(calculator.predictor, path or "", states), "checkpoint": path}

"""`find_adsorption_energy`: from a slab and an adsorbate to the lowest adsorption energy, in one call."""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.anomalies import check_anomalies
from equiformer2.adsorption.corrections import Corrections
from equiformer2.adsorption.dispersion_terms import dispersion_summary
from equiformer2.adsorption.energy import resolve_energy_kind
from equiformer2.adsorption.finished_search import FinishedSearch
from equiformer2.adsorption.placements import Adsorbate
from equiformer2.adsorption.placements import placements as make_placements
from equiformer2.adsorption.search import SearchResult, SearchSettings, search_placements
from equiformer2.adsorption.search_folder import CARD, SEARCH, refuse_other_settings
from equiformer2.adsorption.search_output import write_search
from equiformer2.adsorption.slabs import find_slab
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json
from equiformer2.inference.calculator import EquiformerV2Calculator
from equiformer2.inference.committee import Model
from equiformer2.inference.dispersion import base_calculator
from equiformer2.inference.engines import (
    Engine,
    Engineable,
    NetworkEngine,
    calculator_identity,
    open_engine,
)
from equiformer2.inference.many import Relaxation
from equiformer2.inference.named_calculators import calculator_by_name, calculator_names
from equiformer2.inference.record import model_record
from equiformer2.shipped import find_checkpoint

logger = logging.getLogger(__name__)

#: Settings of a search that the folder of its relaxations does not know.
_SETTINGS = ("placements", "fmax_eV_A", "steps", "stop", "check_minima", "stop_at_spread_eV_A", "corrections")


@dataclass(frozen=True)
class FoundEnergy:
    """Adsorption energy that a search has found.

    Attributes:
        energy: eV; None where no placement has relaxed to the intended adsorbate, as are `best` and `card`.
        energy_kind: what the model predicts, `"adsorption"` or `"total"`.
        converged: whether the best placement has converged.
        best: relaxed structure of the best placement, with the model's energy and forces.
        placements: rows of `search.json`, one per placement.
        card: trust card.
        record: content of `search.json`.
        search: the search itself, with all structures.
    """

    energy: float | None
    energy_kind: str
    converged: bool
    best: Atoms | None
    placements: list[dict[str, Any]]
    card: dict[str, Any] | None
    record: dict[str, Any]
    search: SearchResult


def find_adsorption_energy(
    slab: Any,
    adsorbate: Adsorbate,
    calculator: BaseCalculator | Model | Sequence[Model],
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
    draft: Engineable | None = None,
    check_minima: int = 1,
    out: AnyPath | None = None,
    overwrite: bool = False,
    describe: Callable[[list[Atoms]], dict[str, Any]] | None = None,
    notes: Mapping[str, Any] | None = None,
    clean_slab: Relaxation | None = None,
    stop_at_spread: float | None = None,
    starts_from: AnyPath | None = None,
    corrections: Corrections | None = None,
) -> FoundEnergy:
    """Find the lowest adsorption energy of an adsorbate on a slab.

    Args:
        slab: clean slab as `find_slab` takes it (`Pt111`, a file, Atoms, a pymatgen slab): held atoms stay
            held, and without one OC20's are.
        adsorbate: name (`*CO`, `CH3OH`, …), file or structure, see `placements`.
        calculator: any ASE calculator, or its name (`emt`, `module:factory`: see `calculator_by_name`), or a
            network: a path, the name of a shipped model, a `Predictor`, a list of these (a committee).
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
        draft: a cheaper model (of the same kinds) that relaxes every placement first; the answer is a minimum
            of `calculator` all the same. Where a draft fails, that starts from the placement.
        check_minima: number of the lowest minima that are displaced and relaxed again, since they may be
            saddle points.
        out: folder for all files; the same call continues a stopped search, and gives the result of a
            finished one without writing anything. None keeps nothing.
        overwrite: write the results of a finished search again, for which its relaxations are kept; another
            search in the folder is replaced. What is no file of a search stays.
        describe: gives plain values about the model for the records, from states of the structure.
        notes: plain values about how the slab was made, for the records.
        clean_slab: relaxed by the same model with the same settings, such as an earlier search's.
        stop_at_spread: eV/Å; end a relaxation where the forces of a committee differ by more.
        starts_from: folder of an earlier search of this adsorbate on this slab, whose minima are relaxed
            before the placements.
        corrections: of gases and adsorbates, for the convention of the literature on the card.

    Raises:
        InputError: no adsorbate or placement of that kind, a folder of another search, and what the model
            refuses. Placements that all fail or have an anomaly are no error: they are in the
            result, whose `energy` is None.
    """
    clean = find_slab(slab)
    slab = clean.atoms
    model: Any = named_model(calculator)
    calculator = model if isinstance(model, BaseCalculator) else EquiformerV2Calculator(model)
    drafting: Any = None if draft is None else named_model(draft)
    drafting = None if drafting is None else open_engine(drafting)
    kind = resolve_energy_kind(calculator)
    cutoff = None
    network = base_calculator(calculator)
    if isinstance(network, EquiformerV2Calculator):
        cutoff = network.predictor.checkpoint.config.max_radius
    starts = make_placements(
        slab, adsorbate, mode, placements, seed, positions=positions, height=height, cutoff=cutoff
    )
    settings = SearchSettings(
        fmax,
        steps,
        stop,
        gas,
        dict(gas_per_atom or {}),
        check_minima=check_minima,
        seed=seed,
        stop_at_spread=stop_at_spread,
    )
    placed: dict[str, Any] = {
        "mode": mode,
        "placements": placements,
        "seed": seed,
        "left_out": starts.reasons(),
    }
    if positions is not None:
        placed |= {"positions_A": [list(map(float, xy)) for xy in positions], "height_A": height}
    placed_atoms = [(one.id, one.atoms) for one in starts]
    if starts_from is not None:
        placed_atoms = [*earlier_minima(starts_from, slab, starts[0].atoms), *placed_atoms]
        placed["starts_from"] = str(starts_from)
    told = {**placed, "fmax_eV_A": fmax, "steps": steps, "stop": stop, "check_minima": check_minima}
    told |= {"stop_at_spread_eV_A": stop_at_spread, "slab": clean.report.summary(), **(notes or {})}
    if corrections is not None:
        of_gas = None
        if kind == "total":
            of_gas = {"source": "given" if gas_per_atom else gas, "per_atom_eV": dict(gas_per_atom or {})}
        corrections.check_model(open_engine(calculator).identity(), of_gas)
        told["corrections"] = corrections.summary()
    finished: dict[str, Any] | None = None
    with ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(out)
            check_target(folder, is_folder=True)
            if (folder / SEARCH).exists() and not overwrite:
                finished = read_json(folder / SEARCH)
                _check_same_settings(folder, finished, told)
        result = search_placements(
            slab,
            placed_atoms,
            calculator,
            folder,
            settings,
            placed,
            clean_slab=clean_slab,
            draft=drafting,
            overwrite=overwrite,
            finished=finished is not None,
        )
        best, states = None, [result.found[0].start]
        if result.best is not None and result.best.relaxation is not None:
            best = result.best.relaxation.atoms
            states = [result.best.start, best]
        if finished is not None and _is_result(folder, finished, result):
            logger.info(f"{folder} holds this search, finished: its result is given, and nothing is written")
            record = finished
        else:
            record_of_model = describe(states) if describe else _described(calculator, model, states)
            if best is not None:
                record_of_model["d3_eV"] = dispersion_summary(
                    calculator, best, result.clean_slab.atoms, result.terms, result.gas
                )
            provenance = None
            if isinstance(network, EquiformerV2Calculator):
                provenance = network.predictor.provenance
            of_draft = None
            if drafting is not None:  # a command gives a calculator, and notes its file
                of_draft = _described_draft((notes or {}).get("draft", draft), drafting)
            record = write_search(folder, result, record_of_model, told, provenance, of_draft, corrections)
        card = None if best is None else read_json(folder / CARD)
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


def _check_same_settings(folder: Path, finished: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Raise `InputError` where a finished search was made with other settings than these."""
    before = finished.get("settings") or {}
    now = json.loads(json.dumps(told, default=str))
    refuse_other_settings(folder, [name for name in _SETTINGS if before.get(name) != now.get(name)])


def _is_result(folder: Path, finished: Mapping[str, Any], result: SearchResult) -> bool:
    """Tell whether the files of a finished search are all there and say what a result says."""
    best = (finished.get("best") or {}).get("id")
    return (
        finished.get("adsorption_energy_eV") == result.energy
        and best == (None if result.best is None else result.best.id)
        and all((folder / name).exists() for name in finished["files"])
    )


def earlier_minima(folder: AnyPath, slab: Atoms, placed: Atoms) -> list[tuple[str, Atoms]]:
    """Name and structure of the minima of an earlier search, lowest first, as placements on a slab.

    Args:
        folder: of the earlier search.
        slab: clean slab of this one.
        placed: one of its placements, by which the adsorbate is known.

    Raises:
        InputError: no finished search, or one on another slab, of another adsorbate or of an isomer.
    """
    found = []
    for one in FinishedSearch.read(folder).candidates():
        atoms = one.atoms.copy()
        same = len(atoms) > len(slab) and np.array_equal(atoms.numbers[: len(slab)], slab.numbers)
        if not same or not np.allclose(atoms.cell.array, slab.cell.array, atol=1e-3):
            raise InputError(f"{folder} is a search on another slab: its minima are no starts here")
        same = np.array_equal(atoms.numbers, placed.numbers)
        if not same or check_anomalies(placed, atoms, placed.get_tags())[0].present:  # other bonds within it
            formulas = [system[len(slab) :].get_chemical_formula() for system in (atoms, placed)]
            told = f" ({formulas[0]}, here {formulas[1]})" if formulas[0] != formulas[1] else ""
            raise InputError(
                f"{folder} is a search of another adsorbate{told}: its minima are no starts here"
            )
        atoms.info = {}
        found.append((f"earlier-{one.id}", atoms))
    return found


def named_model(model: Any) -> Any:
    """The calculator of a text that names one, as `--calculator` takes it; anything else as it is.

    A text that is the path of a file, or the name of a shipped model, is a checkpoint.
    """
    if not isinstance(model, str) or Path(model).is_file():
        return model
    is_named = model.lower() in calculator_names() or re.fullmatch(r"[\w.]+:[\w.]+", model)
    return calculator_by_name(model) if is_named else model


def _described_draft(given: Any, engine: Engine) -> dict[str, Any]:
    """Plain values about the model that relaxes first."""
    is_file = isinstance(engine, NetworkEngine) and _is_path(given)
    checkpoint = str(find_checkpoint(given)) if is_file else None
    return {
        "checkpoint": checkpoint,
        "checkpoint_sha256": None if checkpoint is None else sha256(checkpoint),
        **engine.identity(),
    }


def _is_path(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def _described(calculator: BaseCalculator, model: Any, states: list[Atoms]) -> dict[str, Any]:
    """Plain values about a model that was given in Python, for records."""
    network = base_calculator(calculator)
    if not isinstance(network, EquiformerV2Calculator):
        return {"checkpoint": None, **calculator_identity(calculator)}
    path: str | list[str] | None = None
    if _is_path(model):
        path = str(find_checkpoint(model))
    elif isinstance(model, list | tuple) and all(map(_is_path, model)):
        path = [str(find_checkpoint(one)) for one in model]
    return {**model_record(network.predictor, path or "", states), "checkpoint": path}

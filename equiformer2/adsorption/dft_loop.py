"""From a search to DFT and back: which structures to ask, and what the answers say."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from datasets_oc20.own_data.checks import differences
from datasets_oc20.own_data.discovery import find_sources
from datasets_oc20.own_data.writing import write_lmdb
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.collect import (
    DftResult,
    check_agree,
    compare,
    dft_reference,
    match_results,
    read_dft_result,
    with_clean_slab,
)
from equiformer2.adsorption.dft_inputs import Candidate
from equiformer2.adsorption.dft_ledger import ANSWERS, CLEAN_SLAB_ID, Answer, DftLedger
from equiformer2.adsorption.finished_search import FinishedSearch
from equiformer2.adsorption.search_folder import COLLECT, SETTINGS
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, read_json, write_json
from equiformer2.script import header

TRAINING_DATA = "collected.lmdb"
_SAME = 1e-6  # eV


class Asked(NamedTuple):
    """Input that was written now, and rows of the ledger without an answer (`DftLedger.asked`)."""

    folders: list[Path]
    open: list[dict[str, Any]]


def ask_dft(folder: AnyPath, number: int = 5, spread_above: float = 0.0) -> Asked:
    """Write DFT input for the next structures of a search.

    First those where a committee's forces differ most, then the lowest minima that were not asked.

    Args:
        folder: of the search.
        number: most structures; none only tells what is open.
        spread_above: eV/Å; only a larger standard deviation of a force is a reason to ask.

    Raises:
        InputError: no finished search, its files cannot be read, a number or spread without sense.
    """
    if number < 0:
        raise InputError(f"{number} structures cannot be asked: give a number from 0")
    if not 0.0 <= spread_above < float("inf"):
        raise InputError(f"the spread above which to ask is {spread_above} eV/Å: give 0 or more")
    search = FinishedSearch.read(folder)
    ledger = DftLedger(folder)
    known = {row["id"] for row in ledger.asked}
    every = [*search.candidates(), *search.unfinished()]
    doubtful = [one for one in every if (one.force_spread or 0.0) > spread_above]
    doubtful.sort(key=lambda one: -(one.force_spread or 0.0))
    named = {one.id for one in doubtful}
    order = [*doubtful, *(one for one in every if one.is_minimum and one.id not in named)]
    chosen = [one for one in order if one.id not in known][:number]
    folders = ledger.ask(chosen, search.clean_slab) if chosen else []
    return Asked(folders, ledger.open_questions())


def collect_dft(
    folder: AnyPath,
    files: Sequence[AnyPath] = (),
    gas_per_atom: Mapping[str, float] | None = None,
    mixed: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read DFT outputs into the memory of a search, rank all answers, and write training data.

    Writes `dft/ledger.json`, `dft/answers.traj`, `dft/collected.lmdb` and `collect.json`.

    Args:
        folder: of the search.
        files: outputs, or folders of them; without any those in the input folders of the search.
        gas_per_atom: DFT energies per atom of the gas references, eV; those of the last call unless given.
        mixed: take results of different settings of DFT.
        overwrite: take a result in place of an earlier one of the same structure with another energy.

    Returns:
        The content of `collect.json`: see `compare`, and `gas_per_atom_eV`, `left_out` (`file`, `reason`),
        `open` (ids), `training_data` (`file`, `frames`, `energy_kind`), and what was compared: `adsorbate`
        (name), `slab`, `model`, `dft_settings`.

    Raises:
        InputError: no result of a candidate, none of `files` of use, results that contradict each other or an
            earlier one, different settings, a gas reference missing.
    """
    search, ledger = FinishedSearch.read(folder), DftLedger(folder)
    candidates = _structures(search, ledger)
    results, left_out = _read(ledger, files)
    read = {os.path.realpath(result.file) for result in results}
    if not overwrite:
        results = [result for result in results if not _is_known(result, ledger)]
    found, refused = match_results(
        with_clean_slab(candidates, search.clean_slab), results, ledger.answers.values()
    )
    known = {os.path.realpath(file) for answer in ledger.answers.values() for file in answer.files}
    left_out += [(file, reason) for file, reason in refused if os.path.realpath(file) not in known]
    for name, answer in found.items():
        earlier = ledger.answers.get(name)
        goes_on = {os.path.realpath(file) for file in answer.files} & known  # it was read before
        if earlier is not None and not overwrite and not goes_on:
            check_agree(earlier, answer, "give --overwrite to take the second")
    answers = {**ledger.answers, **found}
    none_of_use = bool(files) and not found and not read & known
    if none_of_use or not any(one.id in answers for one in candidates):
        why = "".join(f"; {file}: {reason}" for file, reason in left_out[:3])
        why = why or f": put outputs into the folders in {ledger.folder}, or give them with --dft"
        raise InputError(f"no DFT result is of a candidate of {search.folder}{why}")
    different = differences((answer.files[-1], answer.settings) for answer in answers.values())
    if different and not mixed:
        raise InputError(
            f"DFT results of different settings cannot be compared: {'; '.join(different)} (--mixed takes "
            "them)"
        )
    collected = ledger.folder.parent / COLLECT
    if not gas_per_atom and collected.is_file():
        gas_per_atom = read_json(collected).get("gas_per_atom_eV") or {}
    symbols = search.adsorbate.get_chemical_symbols()
    found_ranking = compare(candidates, answers, gas_per_atom, symbols)
    ledger.answer(list(found.values()))
    reference = dft_reference(answers, gas_per_atom, symbols)
    record = {
        **header("adsorption-collect/2"),
        **found_ranking,
        "gas_per_atom_eV": dict(gas_per_atom or {}),
        **_compared(search, answers),
        "left_out": [{"file": file, "reason": reason} for file, reason in left_out],
        "open": [row["id"] for row in ledger.open_questions()],
        "training_data": _write_training_data(ledger, answers, reference),
    }
    record["warnings"] += _about_settings(search, answers, different)
    write_json(collected, record)
    return record


def _structures(search: FinishedSearch, ledger: DftLedger) -> list[Candidate]:
    """Minima, unfinished relaxations, and what was asked when others were the lowest of their minima."""
    found = [*search.candidates(), *search.unfinished()]
    known = {one.id for one in found} | {CLEAN_SLAB_ID}
    rows = [row for row in ledger.asked if row["id"] not in known]
    placements = {row["id"] for row in search.record["placements"]}
    return found + [
        Candidate(row["id"], search.minimum(row["id"]), row["model_eV"], is_minimum=False)
        for row in rows
        if row["id"] in placements
    ]


def _is_known(result: DftResult, ledger: DftLedger) -> bool:
    """Tell whether a file was read before and has not changed since."""
    path = os.path.realpath(result.file)
    return any(
        path in map(os.path.realpath, answer.files) and abs(answer.energy - result.energy) < _SAME
        for answer in ledger.answers.values()
    )


def _read(ledger: DftLedger, files: Sequence[AnyPath]) -> tuple[list[DftResult], list[tuple[str, str]]]:
    """Read outputs; (file, reason) of those that cannot be used."""
    given = [*files] or [ledger.folder / row["folder"] for row in ledger.asked]
    if not given:
        return [], []
    with as_input_error():
        sources = find_sources([path for path in given if files or Path(path).is_dir()] or given)
    own = {os.path.realpath(ledger.folder / name) for name in (ANSWERS, TRAINING_DATA)}
    results, left_out = [], list(sources.missing)
    for source in sources.sources:
        if os.path.realpath(source.paths[0]) in own:
            continue
        read: list[DftResult] = []
        reasons = []
        for path in source.paths:
            try:
                read.append(read_dft_result(path))
            except (InputError, OSError) as error:
                reasons.append(str(error).removeprefix(f"{path} ").rstrip("."))
        if read:
            results.append(max(read, key=lambda one: sum(one.usable)))
        else:
            left_out.append((source.name, reasons[0]))
    return results, left_out


def _write_training_data(
    ledger: DftLedger, answers: Mapping[str, Answer], reference: float | None
) -> dict[str, Any]:
    """Write all frames with adsorption energies where there is a reference, else with total energies."""
    kind = "total" if reference is None else "adsorption"
    frames: list[Atoms] = []
    for name, answer in answers.items():
        if name == CLEAN_SLAB_ID and reference is not None:
            continue  # it has no adsorption energy
        for number, atoms in enumerate(answer.frames):
            frame = atoms.copy()
            values = dict(atoms.calc.results)
            values["energy"] -= reference or 0.0
            frame.calc = SinglePointCalculator(frame, **values)
            # Placements of other searches have the same names.
            frame.info = {"sid": f"{_sid(ledger, name)}", "fid": number}
            frames.append(frame)
    with_forces = [frame for frame in frames if "forces" in frame.calc.results]
    kept = with_forces or frames
    file = ledger.folder / TRAINING_DATA
    with as_input_error():
        write_lmdb(file, kept, kind, overwrite=True)
    return {"file": str(file), "frames": len(kept), "energy_kind": kind, "has_forces": bool(with_forces)}


def _sid(ledger: DftLedger, name: str) -> str:
    digest = next((row["structure_sha256"] for row in ledger.asked if row["id"] == name), "")
    return f"{ledger.folder.parent.resolve().name}/{name}/{digest[:8]}"


def _compared(search: FinishedSearch, answers: Mapping[str, Answer]) -> dict[str, Any]:
    """Adsorbate, slab, model and DFT of a comparison, by which `correction_averages` joins several."""
    record, settings = search.record, search.folder / SETTINGS
    name = record["settings"].get("adsorbate") or search.adsorbate.get_chemical_formula(mode="reduce")
    gas = record.get("gas") or {}
    dft: dict[str, Any] = {}
    for answer in answers.values():
        dft = {**answer.settings, **dft}
    return {
        "adsorbate": f"*{Path(str(name)).stem.lstrip('*')}",
        "slab": str((record["settings"].get("slab") or {}).get("origin") or search.clean_slab.symbols),
        "model": {
            "checkpoint_sha256": record.get("checkpoint_sha256"),
            "adapter_sha256": record["model"].get("adapter_sha256"),
            "energy_kind": record["energy_kind"],
            "gas": None if not gas else {key: gas.get(key) for key in ("source", "per_atom_eV")},
            "identity": read_json(settings).get("model") if settings.is_file() else None,
        },
        "dft_settings": dft,
    }


def _about_settings(
    search: FinishedSearch, answers: Mapping[str, Answer], different: Sequence[str]
) -> list[str]:
    """Say what the settings of DFT mean for the comparison."""
    found = [f"DFT of different settings is compared: {one}" for one in different]
    functionals = {str(answer.settings.get("functional", "")) for answer in answers.values()} - {"", "RPBE"}
    if functionals and search.record["energy_kind"] == "adsorption":
        found.append(
            f"DFT is {' and '.join(sorted(functionals))}, the model's labels are RPBE unless it was trained "
            "on others: the correction holds this difference, too"
        )
    return found

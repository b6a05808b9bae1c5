"""Files of a search: record, basins, trust card, best structure, DFT input, report."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.cards import label_physics
from equiformer2.adsorption.conventions import conventions
from equiformer2.adsorption.corrections import Corrections
from equiformer2.adsorption.dft_inputs import Candidate
from equiformer2.adsorption.dft_ledger import DftLedger
from equiformer2.adsorption.path_section import path_section
from equiformer2.adsorption.saddle_points import DISPLACEMENT, FALL
from equiformer2.adsorption.search import Found, SearchResult, no_adsorbate_sentence
from equiformer2.adsorption.search_folder import (
    BASINS,
    BEST,
    CARD,
    CLEAN_SLAB,
    DFT,
    REPORT,
    SEARCH,
    TRAJECTORIES,
)
from equiformer2.adsorption.search_page import search_page
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.files import write_bytes, write_json
from equiformer2.inference.record import write_structure
from equiformer2.script import header

#: Structures for which DFT input is written.
_CANDIDATES = 5


def write_search(
    folder: AnyPath,
    result: SearchResult,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    draft: Mapping[str, Any] | None = None,
    corrections: Corrections | None = None,
) -> dict[str, Any]:
    """Write everything that a finished search gives; `search.json` last.

    Without a best placement there is neither a structure, a card, a report nor DFT input.

    Args:
        folder: of the search, with its relaxations.
        result: the search.
        model: plain values about the model (`inference.record.model_record`).
        settings: plain values about how structures and placements were made, and relaxed.
        provenance: of the checkpoint; None for a calculator that is no network of ours.
        draft: plain values about the model that relaxed first.
        corrections: of gases and adsorbates.

    Returns:
        The content of `search.json`.
    """
    folder, best = Path(folder), result.best
    checkpoint = model.get("checkpoint")
    record = search_record(result, model, settings, draft)
    write_structure(folder / CLEAN_SLAB, result.clean_slab.atoms)
    graph = basin_graph(result)
    write_json(folder / BASINS, {**header("adsorption-basins/1", checkpoint), **graph})
    if best is None:
        for name in (BEST, CARD, REPORT):  # of an earlier call
            (folder / name).unlink(missing_ok=True)
    else:
        assert best.relaxation is not None
        write_structure(folder / BEST, best.relaxation.atoms)
        DftLedger(folder).ask(_dft_candidates(result, best), result.clean_slab.atoms)
        card = trust_card(result, model, settings, provenance, sha256(folder / BEST), corrections)
        write_json(folder / CARD, {**header("adsorption-card/1", checkpoint), **card})
        record["conventions"] = card["conventions"]
        record["files"] = [BEST, CARD, REPORT, DFT, *record["files"]]
        report = search_page(result, record, card, graph, path_section(folder))
        write_bytes(folder / REPORT, report.encode())
    write_json(folder / SEARCH, record)
    return record


def _dft_candidates(result: SearchResult, best: Found) -> list[Candidate]:
    """The lowest minima, and what the spread of a committee has ended, highest spread first."""

    def as_candidates(chosen: list[Found]) -> list[Candidate]:
        return [
            Candidate(
                one.id,
                one.relaxation.atoms,
                one.energy,
                one.relaxation.atoms.info.get("max_force_std_eV_A"),
                one.status == "converged",
            )
            for one in chosen
            if one.relaxation is not None
        ]

    minima = (result.ranking() or [best])[:_CANDIDATES]
    doubtful = [one for one in result.found if one.relaxation and one.relaxation.status == "stopped"]
    others = as_candidates([one for one in doubtful if one not in minima])
    others.sort(key=lambda one: -(one.force_spread or 0.0))
    return [*as_candidates(minima), *others[:_CANDIDATES]]


def search_record(
    result: SearchResult,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    draft: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Content of `search.json`; arguments as of `write_search`."""
    best = result.best
    relaxed_first = None
    if draft is not None:
        used = [one.own for one in result.found if one.own is not None and one.own.draft_evaluations]
        relaxed_first = {
            **draft,
            "evaluations": result.draft_evaluations,
            "placements": len(used),
            # A start that the full model has seen as it was placed.
            "failed": sum(one.start_energy_eV is not None for one in used),
        }
    return {
        **header("adsorption-search/1", model.get("checkpoint")),
        "adsorption_energy_eV": result.energy,
        "energy_kind": result.energy_kind,
        "converged": best is not None and not result.unconverged,
        "unconverged": result.unconverged,
        "best": None if best is None else _best_record(best),
        "reason": no_adsorbate_sentence(result.found) if best is None else None,
        "placements": [one.summary() for one in result.found],
        "model_evaluations": result.model_evaluations,
        "draft_evaluations": result.draft_evaluations,
        "draft": relaxed_first,
        "saddle_check": {
            "displacement_A": DISPLACEMENT,
            "tolerance_eV": FALL,
            "checks": [one.summary() for one in result.checks],
        },
        "stop": {
            "reason": result.reason,
            "unseen_probability": result.coverage.unseen_probability,
            "p_lower": result.coverage.p_lower,
            "unseen_basins": result.coverage.unseen_basins,
            "further_placements": result.coverage.further,
        },
        "terms_eV": result.terms,
        "gas": result.gas,
        "d3_eV": model.get("d3_eV"),
        "conventions": None,
        "clean_slab": {
            "converged": result.clean_slab.converged,
            "max_force_eV_A": result.clean_slab.max_force_eV_A,
            "symmetry_operations": result.symmetry_operations,
        },
        "model": dict(model),
        "settings": dict(settings),
        "files": [CLEAN_SLAB, BASINS, TRAJECTORIES],
    }


def _best_record(best: Found) -> dict[str, Any]:
    """Collect the plain values of the best placement for `search.json`."""
    assert best.relaxation is not None
    return {
        "id": best.id,
        "file": BEST,
        "energy_eV": best.energy,
        "start_energy_eV": best.start_energy,
        "max_force_eV_A": best.relaxation.max_force_eV_A,
        "converged": best.status == "converged",
        "checked_by": best.relaxation.id if best.saddle is not None else None,
        "saddle_energy_eV": best.saddle_energy,
        "anomalies": [one.summary() for one in best.anomalies if one.present],
        "anomaly_checks": [one.summary() | {"present": one.present} for one in best.anomalies],
    }


def trust_card(
    result: SearchResult,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any] | None,
    structure_sha256: str,
    corrections: Corrections | None = None,
) -> dict[str, Any]:
    """Collect what the energy rests on, and under `verifiable` what `cards.verify_card` recomputes."""
    best = result.best
    assert best is not None
    assert best.relaxation is not None
    assert result.energy is not None  # as there is a best placement
    atoms = best.relaxation.atoms
    adsorbate, name = atoms[len(result.clean_slab.atoms) :], settings.get("adsorbate")
    return {
        "adsorption_energy_eV": result.energy,
        "start_energy_eV": best.start_energy,
        "energy_kind": result.energy_kind,
        "terms_eV": result.terms,
        "gas": result.gas,
        "d3_eV": model.get("d3_eV"),
        "conventions": conventions(
            result.energy,
            result.energy_kind,
            adsorbate,
            result.gas,
            provenance,
            corrections,
            None if name is None else Path(str(name)).stem,
        ),
        "structure": BEST,
        "placement": best.id,
        "model": dict(model),
        "settings": dict(settings),
        "label_physics": label_physics(atoms, result.energy_kind, provenance),
        "anomaly_checks": [
            one.summary() | {"present": one.present, "sentence": one.sentence} for one in best.anomalies
        ],
        "migration_A": best.migration,
        "energy_std_eV": atoms.info.get("energy_std_eV"),
        "max_force_std_eV_A": atoms.info.get("max_force_std_eV_A"),
        "coverage": vars(result.coverage),
        "saddle_checks": [one.summary() for one in result.checks],
        "verifiable": {
            "structure_sha256": structure_sha256,
            "model_energy_eV": best.relaxation.energy_eV,
            "max_force_eV_A": best.relaxation.max_force_eV_A,
        },
    }


def basin_graph(result: SearchResult) -> dict[str, Any]:
    """List the minima with the placements that ended in each, and the steps that were saved."""
    ended = Counter(one.basin for one in result.found if one.basin is not None)
    steps = [one.own.steps for one in result.found if one.own is not None]
    left_out = sum(one.relaxation is None for one in result.found)
    return {
        "basins": [
            {
                "id": one.id,
                "energy_eV": one.energy,
                "multiplicity": ended[one.id],
                "placements": [other.id for other in result.found if other.basin == one.id],
            }
            for one in result.ranking()
        ],
        "placements_not_relaxed": left_out,
        "steps": sum(steps),
        "steps_saved": round(left_out * sum(steps) / len(steps)) if steps else 0,
    }

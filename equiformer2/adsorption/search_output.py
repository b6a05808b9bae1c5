"""Files of a search: record, basins, trust card, best structure, DFT input, report."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.cards import label_physics
from equiformer2.adsorption.conventions import conventions
from equiformer2.adsorption.dft_inputs import Candidate, write_dft_inputs
from equiformer2.adsorption.search import SearchResult
from equiformer2.adsorption.search_page import search_page
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.files import write_bytes, write_json
from equiformer2.inference.record import write_structure
from equiformer2.script import header

SEARCH, CARD, BEST, BASINS, REPORT = "search.json", "card.json", "best.extxyz", "basins.json", "report.html"
CLEAN_SLAB = "clean_slab.extxyz"
#: Structures for which DFT input is written.
_CANDIDATES = 5


def write_search(
    folder: AnyPath,
    result: SearchResult,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write everything that a finished search gives; `search.json` last.

    Args:
        folder: of the search, with its relaxations.
        result: the search.
        model: plain values about the model (`inference.record.model_record`).
        settings: plain values about how structures and placements were made, and relaxed.
        provenance: of the checkpoint; None for a calculator that is no network of ours.

    Returns:
        The content of `search.json`.
    """
    folder, best = Path(folder), result.best
    assert best.relaxation is not None
    write_structure(folder / BEST, best.relaxation.atoms)
    write_structure(folder / CLEAN_SLAB, result.clean_slab.atoms)
    candidates = [
        Candidate(one.id, one.relaxation.atoms, one.energy)
        for one in result.ranking()[:_CANDIDATES]
        if one.relaxation is not None
    ] or [Candidate(best.id, best.relaxation.atoms, best.energy)]
    write_dft_inputs(folder / "dft", candidates, result.clean_slab.atoms)
    card = trust_card(result, model, settings, provenance, sha256(folder / BEST))
    checkpoint = model.get("checkpoint")
    write_json(folder / CARD, {**header("adsorption-card/1", checkpoint), **card})
    write_json(folder / BASINS, {**header("adsorption-basins/1", checkpoint), **basin_graph(result)})
    record = {
        **header("adsorption-search/1", checkpoint),
        "adsorption_energy_eV": result.energy,
        "energy_kind": result.energy_kind,
        "converged": best.status == "converged",
        "best": {
            "id": best.id,
            "file": BEST,
            "energy_eV": result.energy,
            "start_energy_eV": best.start_energy,
            "max_force_eV_A": best.relaxation.max_force_eV_A,
            "converged": best.status == "converged",
            "anomalies": [one.summary() for one in best.anomalies if one.present],
            "anomaly_checks": [one.summary() | {"present": one.present} for one in best.anomalies],
        },
        "placements": [one.summary() for one in result.found],
        "model_evaluations": result.model_evaluations,
        "stop": {
            "reason": result.reason,
            "unseen_probability": result.coverage.unseen_probability,
            "p_lower": result.coverage.p_lower,
            "unseen_basins": result.coverage.unseen_basins,
        },
        "terms_eV": result.terms,
        "gas": result.gas,
        "d3_eV": model.get("d3_eV"),
        "conventions": card["conventions"],
        "clean_slab": {
            "converged": result.clean_slab.converged,
            "max_force_eV_A": result.clean_slab.max_force_eV_A,
            "symmetry_operations": result.symmetry_operations,
        },
        "model": dict(model),
        "settings": dict(settings),
        "files": [BEST, CLEAN_SLAB, BASINS, CARD, REPORT, "dft", "trajectories"],
    }
    write_bytes(folder / REPORT, search_page(result, record, card).encode())
    write_json(folder / SEARCH, record)
    return record


def trust_card(
    result: SearchResult,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any] | None,
    structure_sha256: str,
) -> dict[str, Any]:
    """Collect what the energy rests on, and under `verifiable` what `cards.verify_card` recomputes."""
    best = result.best
    assert best.relaxation is not None
    atoms = best.relaxation.atoms
    return {
        "adsorption_energy_eV": result.energy,
        "start_energy_eV": best.start_energy,
        "energy_kind": result.energy_kind,
        "terms_eV": result.terms,
        "gas": result.gas,
        "d3_eV": model.get("d3_eV"),
        "conventions": conventions(
            result.energy, result.energy_kind, atoms[len(result.clean_slab.atoms) :], result.gas, provenance
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
        "verifiable": {
            "structure_sha256": structure_sha256,
            "model_energy_eV": best.relaxation.energy_eV,
            "max_force_eV_A": best.relaxation.max_force_eV_A,
        },
    }


def basin_graph(result: SearchResult) -> dict[str, Any]:
    """List the minima with the placements that ended in each, and the steps that were saved."""
    ended = Counter(one.basin for one in result.found if one.basin is not None)
    steps = [one.relaxation.steps for one in result.found if one.relaxation is not None]
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

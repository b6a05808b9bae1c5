"""Files of a search: record, basins, trust card, best structure, DFT input, report."""

from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from ase import Atoms
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from equiformer2.adsorption.basins import ENOUGH, LOWER
from equiformer2.adsorption.cards import label_physics
from equiformer2.adsorption.dft_inputs import Candidate, write_dft_inputs
from equiformer2.adsorption.search import SearchResult
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.files import write_bytes, write_json
from equiformer2.inference.pictures import structure_picture
from equiformer2.inference.record import write_structure
from equiformer2.report import bullets, page, picture, structure_viewer, table, viewer_script
from equiformer2.script import header

SEARCH, CARD, BEST, BASINS, REPORT = "search.json", "card.json", "best.extxyz", "basins.json", "report.html"
#: Structures for which DFT input is written.
_CANDIDATES = 5


def write_search(
    folder: Path, result: SearchResult, model: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write everything that a finished search gives; `search.json` last.

    Args:
        folder: of the search, with its relaxations.
        result: the search.
        model: plain values about the model (`inference.record.model_record`).
        settings: plain values about how structures and placements were made, and relaxed.

    Returns:
        The content of `search.json`.
    """
    best = result.best
    assert best.relaxation is not None
    write_structure(folder / BEST, best.relaxation.atoms)
    candidates = [
        Candidate(one.id, one.relaxation.atoms, one.energy)
        for one in result.ranking()[:_CANDIDATES]
        if one.relaxation is not None
    ] or [Candidate(best.id, best.relaxation.atoms, best.energy)]
    write_dft_inputs(folder / "dft", candidates, result.clean_slab.atoms)
    card = trust_card(result, model, settings, sha256(folder / BEST))
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
        "clean_slab": {
            "converged": result.clean_slab.converged,
            "max_force_eV_A": result.clean_slab.max_force_eV_A,
            "symmetry_operations": result.symmetry_operations,
        },
        "model": dict(model),
        "settings": dict(settings),
        "files": [BEST, BASINS, CARD, REPORT, "dft", "trajectories"],
    }
    write_bytes(folder / REPORT, search_page(result, record, card).encode())
    write_json(folder / SEARCH, record)
    return record


def trust_card(
    result: SearchResult, model: Mapping[str, Any], settings: Mapping[str, Any], structure_sha256: str
) -> dict[str, Any]:
    """Collect what the energy rests on, and under `verifiable` what `cards.verify_card` recomputes."""
    best = result.best
    assert best.relaxation is not None
    atoms = best.relaxation.atoms
    provenance = model.get("provenance")
    return {
        "adsorption_energy_eV": result.energy,
        "start_energy_eV": best.start_energy,
        "energy_kind": result.energy_kind,
        "terms_eV": result.terms,
        "gas": result.gas,
        "structure": BEST,
        "placement": best.id,
        "model": {name: value for name, value in model.items() if name != "provenance"},
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


def search_page(result: SearchResult, record: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """Write the report as one HTML page."""
    best = result.best
    assert best.relaxation is not None
    symbols = best.start.get_chemical_symbols()
    adsorbate = Atoms(symbols[len(result.clean_slab.atoms) :]).get_chemical_formula()
    name = f"{adsorbate} on {result.clean_slab.atoms.get_chemical_formula()}"
    both = {"relaxed": best.relaxation.atoms, "start": best.start, "clean slab": result.clean_slab.atoms}
    drawing = structure_picture(
        {"relaxed": best.relaxation.atoms, "start": best.start}, f"{name}: {result.energy:.3f} eV"
    )
    counts = Counter(one.status for one in result.found)
    coverage = result.coverage
    rows = [
        [
            one.id,
            one.status if one.merged_into is None else f"copy of {one.merged_into}",
            one.basin or "",
            _number(one.energy, 3),
            _number(one.start_energy, 3),
            "" if one.relaxation is None else str(one.relaxation.steps),
            _number(None if one.relaxation is None else one.relaxation.max_force_eV_A, 3),
            ", ".join(anomaly.name for anomaly in one.anomalies if anomaly.present),
        ]
        for one in result.found
    ]
    head = [
        "placement",
        "status",
        "minimum",
        "energy (eV)",
        "start (eV)",
        "steps",
        "force (eV/Å)",
        "anomalies",
    ]
    checks = [
        [one.name, "yes" if one.present else "no", _number(one.margin, 2), one.sentence]
        for one in best.anomalies
    ]
    parts = [
        viewer_script(),
        f"<p>Adsorption energy of {name}: <b>{result.energy:.3f} eV</b> "
        f"({best.status}, largest force {_number(best.relaxation.max_force_eV_A, 3)} eV/Å; "
        f"the start of this placement: {_number(best.start_energy, 3)} eV).</p>",
        bullets(_meaning(result)),
        structure_viewer("best", both, "<p>This browser does not draw in three dimensions.</p>"),
        picture("Best placement", drawing),
        "<h2>Would another placement be lower?</h2>",
        bullets(
            [
                f"{len(result.found)} placements: "
                + ", ".join(f"{number} {status}" for status, number in counts.items())
                + f". The search ended: {result.reason}.",
                f"{coverage.draws} of them ended in {coverage.basins} minima. The next one would end in an "
                f"unseen minimum with a probability of {coverage.unseen_probability:.1%}.",
                f"A minimum lower by more than {LOWER:g} eV among the placements that were not relaxed has a "
                f"probability of {coverage.p_lower:.1%} (the search may stop below {ENOUGH:.0%}).",
            ]
        ),
        picture("Minima", basin_picture(result)),
        "<h2>Anomalies of the best placement</h2>",
        table(["rule", "present", "margin (Å)", "verdict"], checks),
        "<h2>What the number rests on</h2>",
        bullets([*card["label_physics"], *_model_sentences(record)]),
        "<h2>All placements</h2>",
        table(head, rows),
    ]
    return page(name, parts)


def basin_picture(result: SearchResult) -> bytes:
    """Draw start and relaxed energy of every placement, and the minimum that it ended in, as PNG."""
    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    basins = {one.id: number for number, one in enumerate(result.ranking())}
    for one in result.found:
        if one.energy is None or one.start_energy is None:
            continue
        known = one.basin in basins
        place = float(basins[one.basin]) if known and one.basin is not None else -1.0
        colour = f"C{int(place) % 10}" if known else "0.6"
        axis.plot(
            [place - 0.3, place + 0.2], [one.start_energy, one.energy], "-", color=colour, linewidth=0.8
        )
        axis.plot(place + 0.2, one.energy, "o" if known else "x", color=colour, markersize=5)
    axis.set_xticks([-1, *basins.values()], ["no minimum", *basins], rotation=45, ha="right", fontsize=8)
    axis.set(ylabel="adsorption energy (eV)", title="from the start (left) to the relaxed placement (dot)")
    axis.grid(alpha=0.3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _meaning(result: SearchResult) -> list[str]:
    if result.energy_kind == "adsorption":
        return ["The model predicts adsorption energies: nothing was subtracted."]
    gas = result.gas or {}
    return [
        f"The model predicts total energies: {result.terms['slab']:.4f} eV of the relaxed clean slab and "
        f"{result.terms['gas']:.4f} eV of the gas references ({gas.get('label', '')}) were subtracted."
    ]


def _model_sentences(record: Mapping[str, Any]) -> list[str]:
    model = record["model"]
    said = [f"model: {model.get('checkpoint') or model.get('calculator')}"]
    if record["checkpoint_sha256"]:
        said.append(f"SHA-256 of the checkpoint: {record['checkpoint_sha256']}")
    said += (model.get("familiarity") or {}).get("sentences", [])
    error = (model.get("validation") or {}).get("energy_mae_eV")
    if error is not None:
        said.append(f"energy error of the checkpoint on its own validation data: {error:.2f} eV")
    return said


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"

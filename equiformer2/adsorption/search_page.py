"""Report of a search: one HTML page with everything in it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ase import Atoms

from equiformer2.adsorption.basins import ENOUGH, LOWER
from equiformer2.adsorption.conventions import convention_lines
from equiformer2.adsorption.dispersion_terms import dispersion_lines
from equiformer2.adsorption.search import SearchResult
from equiformer2.inference.pictures import new_figure, png_bytes, structure_picture
from equiformer2.report import bullets, page, picture, structure_viewer, table, viewer_script


def search_page(
    result: SearchResult,
    record: Mapping[str, Any],
    card: Mapping[str, Any],
    graph: Mapping[str, Any],
    paths: str = "",
) -> str:
    """Write the report as one HTML page.

    Args:
        result: the search, with a best placement.
        record: content of `search.json`.
        card: content of `card.json`.
        graph: minima and saved steps, as in `basins.json`.
        paths: HTML about paths between its minima (`path_section`).
    """
    best = result.best
    assert best is not None
    assert best.relaxation is not None

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    symbols = best.start.get_chemical_symbols()
    adsorbate = Atoms(symbols[len(result.clean_slab.atoms) :]).get_chemical_formula()
    slab = record["settings"].get("slab")
    formula = result.clean_slab.atoms.get_chemical_formula()
    name = f"{adsorbate} on " + (f"{slab['origin']} ({formula})" if isinstance(slab, Mapping) else formula)
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
            number(one.energy, 3),
            number(one.start_energy, 3),
            "" if one.relaxation is None else str(one.relaxation.steps),
            number(None if one.relaxation is None else one.relaxation.max_force_eV_A, 3),
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
        [one.name, "yes" if one.present else "no", number(one.margin, 2), one.sentence]
        for one in best.anomalies
    ]
    told = record["model"]
    model = [f"model: {told.get('checkpoint') or told.get('calculator')}"]
    if record["checkpoint_sha256"]:
        model.append(f"SHA-256 of the checkpoint: {record['checkpoint_sha256']}")
    if told.get("adapter"):
        model.append(f"adapter: {told['adapter']} (SHA-256 {told['adapter_sha256']})")
    model += (told.get("familiarity") or {}).get("sentences", [])
    if card["energy_std_eV"] is not None:
        model.append(f"spread of the committee: {card['energy_std_eV']:.3f} eV")
        if card["max_force_std_eV_A"] is not None:
            model[-1] += f", and up to {card['max_force_std_eV_A']:.3f} eV/Å in the force on an atom"
    error = (told.get("validation") or {}).get("energy_mae_eV")
    if error is not None:
        model.append(f"energy error of the checkpoint on its own validation data: {error:.2f} eV")
    meaning = "The model predicts adsorption energies: nothing was subtracted" + (
        "." if card["d3_eV"] is None else " but D3 of the clean slab and of the gases."
    )
    if result.energy_kind == "total":
        meaning = (
            f"The model predicts total energies: {result.terms['slab']:.4f} eV of the relaxed clean slab and "
            f"{result.terms['gas']:.4f} eV of the gas references ({(result.gas or {}).get('label', '')}) "
            "were subtracted."
        )
    unseen = [
        f"A further placement would end in an unseen minimum with a probability of "
        f"{coverage.unseen_probability:.1%}.",
        f"{coverage.further} more placements find a minimum lower by more than {LOWER:g} eV with a "
        f"probability of {coverage.p_lower:.1%} (the search may stop below {ENOUGH:.0%}).",
    ]
    parts = [
        viewer_script(),
        f"<p>Adsorption energy of {name}: <b>{result.energy:.3f} eV</b> "
        f"({best.status}, largest force {number(best.relaxation.max_force_eV_A, 3)} eV/Å; "
        f"the start of this placement: {number(best.start_energy, 3)} eV).</p>",
        *(f"<p><b>Not converged: {part}.</b></p>" for part in result.unconverged),
        bullets([meaning, *dispersion_lines(card["d3_eV"]), *convention_lines(card["conventions"])]),
        structure_viewer("best", both, "<p>This browser does not draw in three dimensions.</p>"),
        picture("Best placement", drawing),
        "<h2>Would another placement be lower?</h2>",
        bullets(
            [
                f"{len(result.found)} placements: "
                + ", ".join(f"{number} {status}" for status, number in counts.items())
                + f". The search ended: {result.reason}.",
                f"{coverage.draws} of them ended in {coverage.basins} minima.",
                *(f"Check of saddle points: {one.sentence}." for one in result.checks),
                *unseen,
                _saved(graph),
            ]
        ),
        picture("Minima", basin_picture(result)),
        *_minima(graph),
        "<h2>Anomalies of the best placement</h2>",
        table(["rule", "present", "margin (Å)", "verdict"], checks),
        "<h2>What the number rests on</h2>",
        bullets([*card["label_physics"], *model, *_settings(record["settings"])]),
        "<h2>All placements</h2>",
        table(head, rows),
        paths,
    ]
    return page(name, parts)


def _saved(graph: Mapping[str, Any]) -> str:
    """Say how many steps the placements that were not relaxed have saved."""
    return (
        f"The relaxations took {graph['steps']} steps; {graph['placements_not_relaxed']} placements were not "
        f"relaxed, which saved about {graph['steps_saved']} steps."
    )


def _minima(graph: Mapping[str, Any]) -> list[str]:
    """Table of the minima with the number of placements that ended in each; nothing without minima."""
    rows = [
        [one["id"], f"{one['energy_eV']:.3f}", str(one["multiplicity"]), ", ".join(one["placements"])]
        for one in graph["basins"]
    ]
    head = ["minimum", "energy (eV)", "placements", "which"]
    return ["<h2>Minima</h2>", table(head, rows)] if rows else []


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """Say how placements and slab were made."""
    sentences = [
        f"placements: {settings['mode']}, at most {settings['placements']}, random seed {settings['seed']}; "
        f"relaxed until no force is above {settings['fmax_eV_A']:g} eV/Å, in at most {settings['steps']} "
        "steps"
    ]
    slab = settings.get("slab")
    if isinstance(slab, Mapping):
        cut = "" if slab.get("miller") is None else f", Miller indices {tuple(slab['miller'])}"
        sentences.append(
            f"slab: {slab['origin']}{cut}, {slab['atoms']} atoms, {slab['held']} of them held, "
            f"{slab['thickness_A']:.1f} Å thick"
        )
    return sentences


def basin_picture(result: SearchResult) -> bytes:
    """Draw start and relaxed energy of every placement, and the minimum that it ended in, as PNG."""
    figure = new_figure(7.2, 4.2)
    axis = figure.subplots()
    basins = {one.id: number for number, one in enumerate(result.ranking())}
    for one in result.found:
        if one.energy is None:
            continue
        known = one.basin in basins
        place = float(basins[one.basin]) if known and one.basin is not None else -1.0
        colour = f"C{int(place) % 10}" if known else "0.6"
        if one.start_energy is not None:  # a draft moved it before the model saw it
            axis.plot(
                [place - 0.3, place + 0.2], [one.start_energy, one.energy], "-", color=colour, linewidth=0.8
            )
        axis.plot(place + 0.2, one.energy, "o" if known else "x", color=colour, markersize=5)
    outside = any(one.energy is not None and one.basin not in basins for one in result.found)
    ticks = {**({"no minimum": -1} if outside else {}), **basins}
    axis.set_xticks([*ticks.values()], [*ticks], rotation=45, ha="right", fontsize=8)
    axis.set(ylabel="adsorption energy (eV)", title="from the start (left) to the relaxed placement (dot)")
    axis.grid(alpha=0.3)
    return png_bytes(figure)

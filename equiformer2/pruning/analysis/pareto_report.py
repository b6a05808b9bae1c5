"""Table and figure of a study: accuracy of each method at equal operations and in measured time."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datasets_oc20.untrusted import AnyPath
from equiformer2.files import write_bytes, write_json
from equiformer2.pruning.analysis.pareto import DENSE
from equiformer2.script import header
from equiformer2.training.figures import save_figure

#: References of the errors: key of a result and its words.
REFERENCES = {"to_dense": "the dense network", "to_labels": "labels"}
_TRAINED = {"cut": "as cut", "distilled": "distilled"}
_MARKERS = "osD^vP*X<>hpd"


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average results over seeds: one row per method, budget and state of training.

    Each row has `method`, `keep`, `trained` (`cut` or `distilled`), `seeds`, `macs`, `macs_on[set]` (of a
    router they depend on the structures), `parameters`, `latency`, and `errors[set][reference][metric]` with
    `mean` and `std` (0 for one seed). Results that missed their budget have no row, see `missed`.

    Args:
        results: results of `Study.run`.

    Returns:
        The rows.
    """

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    def distribution(values: Sequence[float | None]) -> dict[str, float] | None:
        known = [value for value in values if value is not None]
        if not known:
            return None
        deviation = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
        return {"mean": mean(known), "std": deviation}

    def errors(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        means: dict[str, Any] = {name: {} for name in results[0]}
        for name, reference in itertools.product(means, REFERENCES):
            having = [result[name][reference] for result in results if result[name][reference] is not None]
            means[name][reference] = (
                {metric: distribution([item[metric] for item in having]) for metric in having[0]}
                if having
                else None
            )
        return means

    rows = []
    results = [result for result in results if "missed" not in result]
    groups = dict.fromkeys((result["method"], result["keep"]) for result in results)
    for method, keep in groups:
        same = [r for r in results if (r["method"], r["keep"]) == (method, keep)]
        for trained in _TRAINED:
            having = [result for result in same if result[trained] is not None]
            if having:
                rows.append(
                    {
                        "method": method,
                        "keep": keep,
                        "trained": trained,
                        "seeds": [result["seed"] for result in having],
                        "macs": mean([result["macs"] for result in having]),
                        "macs_on": {
                            name: mean([_macs_on(result, name) for result in having])
                            for name in having[0][trained]
                        },
                        "parameters": mean([result["parameters"] for result in having]),
                        "latency": mean([result["latency"]["ratio"] for result in having]),
                        "errors": errors([result[trained] for result in having]),
                    }
                )
    return rows


def missed(results: Sequence[dict[str, Any]]) -> str:
    """List the results that do not exist, because no schedule comes near the budget.

    Args:
        results: results of `Study.run`.

    Returns:
        Markdown; empty for none.
    """
    lines = [
        f"- {result['method']} at {result['keep']:.0%}, seed {result['seed']}: {result['missed']}"
        for result in results
        if "missed" in result
    ]
    return "\n".join(["## Not reached", "", *lines, ""]) if lines else ""


def write_report(results: Sequence[dict[str, Any]], out: AnyPath, checkpoint: AnyPath | None = None) -> None:
    """Write `pareto.json`, `pareto.md` and `pareto.png`.

    Args:
        results: results of `Study.run`.
        out: folder to write to.
        checkpoint: file of the dense network, whose SHA-256 is noted.
    """
    out = Path(out)
    rows = summarise(results)
    record = {**header("prune-pareto/1", checkpoint), "rows": rows, "results": list(results)}
    write_json(out / "pareto.json", record, make_folder=True)
    write_bytes(out / "pareto.md", "\n".join((markdown(rows), missed(results))).encode())
    draw(rows, results, out / "pareto.png")


def markdown(rows: Sequence[dict[str, Any]], times: bool = True) -> str:
    """Write one table per held-out set and reference: force MAE and energy error per atom (mean ± std).

    Args:
        rows: rows of `summarise`.
        times: with a column of the measured times; without where the machine was busy with something else.

    Returns:
        Markdown.
    """

    def text(value: dict[str, float] | None) -> str:
        return "" if value is None else f"{value['mean']:.4f} ± {value['std']:.4f}"

    parts = []
    time, line = (" time |", "---|") if times else ("", "")
    for name, reference in _panels(rows):
        parts += [
            f"## {name}: errors against {REFERENCES[reference]}",
            "",
            f"| method | training | MACs | parameters |{time} force MAE (eV/Å) | energy (eV/atom) | seeds |",
            f"|---|---|---|---|{line}---|---|---|",
        ]
        for row in rows:
            errors = row["errors"][name][reference]
            if errors is None:
                continue
            parts.append(
                f"| {row['method']} | {'' if row['method'] == DENSE else _TRAINED[row['trained']]} "
                f"| {row['macs_on'][name]:.1%} | {row['parameters']:.1%} "
                + (f"| {row['latency']:.2f} x " if times else "")
                + f"| {text(errors['force_mae'])} | {text(errors['energy_per_atom'])} "
                + f"| {len(row['seeds'])} |"
            )
        parts.append("")
    return "\n".join(parts)


def draw(rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], target: AnyPath) -> None:
    """Draw the force MAE against operations (left) and measured time (right), one row per set and reference.

    Args:
        rows: rows of `summarise`.
        results: results of `Study.run`, whose seeds are drawn as points.
        target: picture to write.
    """
    target = Path(target)
    results = [result for result in results if "missed" not in result]
    panels = _panels(rows)
    figure = Figure(figsize=(11, 3.9 * len(panels)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(panels), 2))
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != DENSE]
    for (name, reference), pair in zip(panels, axes, strict=True):
        for axis, quantity in zip(pair, ("macs", "latency"), strict=True):
            for position, method in enumerate(methods):
                for trained in _TRAINED:
                    _line(axis, rows, results, (name, reference), quantity, (method, trained), position)
            dense = [row for row in rows if row["method"] == DENSE]
            level = dense[0]["errors"][name][reference]["force_mae"] if dense else None
            if reference == "to_labels" and level is not None:
                axis.axhline(level["mean"], color="0.3", linestyle=":", linewidth=1, label="dense")
            axis.set_xlabel("MACs / dense" if quantity == "macs" else "measured time / dense (interleaved)")
            axis.set_ylabel("force MAE (eV/Å)")
            axis.set_title(f"{name}: against {REFERENCES[reference]}", fontsize=10)
            axis.grid(alpha=0.3)
        if pair[0].get_legend_handles_labels()[0]:
            pair[0].legend(fontsize=7, ncols=2)
    save_figure(figure, target)


def _line(
    axis: Axes,
    rows: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    panel: tuple[str, str],
    quantity: str,
    kind: tuple[str, str],
    position: int,
) -> None:
    """Mean over seeds as a line, every seed as a small point."""
    (name, reference), (method, trained) = panel, kind
    own = [row for row in rows if (row["method"], row["trained"]) == kind]
    points = sorted(
        (
            row["macs_on"][name] if quantity == "macs" else row["latency"],
            row["errors"][name][reference]["force_mae"]["mean"],
        )
        for row in own
        if row["errors"][name][reference] and row["errors"][name][reference]["force_mae"]
    )
    if not points:
        return
    color, marker = f"C{position % 10}", _MARKERS[position % len(_MARKERS)]
    style = "-" if trained == "distilled" else "--"
    label = f"{method}, {_TRAINED[trained]}"
    look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.2}
    axis.plot(*np.array(points).T, style, label=label, **look)
    for result in results:
        if result["method"] == method and result[trained] is not None:
            errors = result[trained][name][reference]
            x = _macs_on(result, name) if quantity == "macs" else result["latency"]["ratio"]
            if errors and errors["force_mae"] is not None:
                axis.plot([x], [errors["force_mae"]], ".", color=color, markersize=3, alpha=0.6)


def _macs_on(result: dict[str, Any], name: str) -> float:
    """Share of the MACs on a held-out set; of a plan it is counted on the calibration structures."""
    return float(result.get("macs_on", {}).get(name, result["macs"]))


def _panels(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Held-out sets and references that have errors."""
    panels = dict.fromkeys(
        (name, reference)
        for row in rows
        for name, errors in row["errors"].items()
        for reference in REFERENCES
        if errors[reference] is not None
    )
    return list(panels)

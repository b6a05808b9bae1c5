"""Figures of a pruning study: force MAE against operations and against time."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equiformer2.pruning.analysis.pareto import DENSE, PREFIX, SCRATCH
from equiformer2.training.figures import save_figure
from studies.campaign import Campaign
from studies.force_call_times import way_of

_MARKERS = "osD^vP*X<>dp"

Rows = list[dict[str, Any]]


Place = Callable[[dict[str, Any], str, str], float]
"""Row, network and held-out set to the position on the horizontal axis; NaN for rows that are left out."""


def draw(campaign: Campaign, tables: Mapping[str, Rows], target: Path) -> None:
    """Against operations; left of each pair errors against the dense network, right against labels."""
    _figure(campaign, tables, lambda row, _, held_out: row["macs_on"][held_out], "MACs / dense", target)


def draw_times(
    campaign: Campaign, tables: Mapping[str, Rows], speed: Mapping[str, Any], target: Path
) -> bool:
    """The same against the measured time of a force call, of what was timed; whether there is anything."""

    def time(row: dict[str, Any], network: str, _: str) -> float:
        if not row["method"].startswith(PREFIX) and row["keep"] != campaign.speed.keep:
            return math.nan
        # From random weights the plans of `multi` are trained: as fast.
        method = "multi" if row["method"] == SCRATCH else row["method"]
        ways = {way_of(campaign, method, seed) for seed in campaign.seeds}
        ratios = [
            speed[f"{network}_{way}"]["latency"]["ratio"] for way in ways if f"{network}_{way}" in speed
        ]
        return sum(ratios) / len(ratios) if ratios else math.nan

    return _figure(campaign, tables, time, "time of a force call / dense", target)


def _figure(campaign: Campaign, tables: Mapping[str, Rows], place: Place, label: str, target: Path) -> bool:
    """A row of panels per network, two panels per held-out set."""
    shown: dict[str, Rows] = {}
    for study, rows in tables.items():
        network = campaign.studies[study].model
        held_out = next(iter(campaign.held_out))
        kept = [
            row for row in rows if row["method"] == DENSE or not math.isnan(place(row, network, held_out))
        ]
        shown.setdefault(network, []).extend(kept)
    models = [name for name in campaign.models if any(r["method"] != DENSE for r in shown.get(name, []))]
    if not models:
        return False
    methods = list(
        dict.fromkeys(row["method"] for rows in tables.values() for row in rows if row["method"] != DENSE)
    )
    figure = Figure(figsize=(6 * len(campaign.held_out) * 2, 4.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 2 * len(campaign.held_out), squeeze=False)
    for model, line in zip(models, axes, strict=True):
        panels = [(name, against) for name in campaign.held_out for against in ("to_dense", "to_labels")]
        for (held_out, reference), axis in zip(panels, line, strict=True):
            places = [(place(row, model, held_out), row) for row in shown[model]]
            _panel(axis, places, methods, held_out, reference)
            against = "the dense network" if reference == "to_dense" else "labels"
            axis.set_title(f"{model}, {held_out}: against {against}", fontsize=10)
            axis.set_xlabel(label)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    save_figure(figure, target)
    return True


def _panel(
    axis: Axes,
    places: Sequence[tuple[float, dict[str, Any]]],
    methods: list[str],
    held_out: str,
    reference: str,
) -> None:
    drawn = set()
    for x, row in places:
        errors = row["errors"][held_out][reference]
        if not errors or not errors["force_mae"]:
            continue
        value = errors["force_mae"]
        if row["method"] == DENSE:
            if reference == "to_labels" and "dense" not in drawn:
                axis.axhline(value["mean"], color="0.3", linestyle=":", linewidth=1.2, label="dense")
                drawn.add("dense")
            continue
        distilled = row["trained"] == "distilled"
        position = methods.index(row["method"])
        label = f"{row['method']}{', trained' if distilled else ''}"
        axis.errorbar(
            x,
            value["mean"],
            yerr=value["std"],
            fmt=_MARKERS[position % len(_MARKERS)],
            color=f"C{position % 10}",
            fillstyle="full" if distilled else "none",
            markersize=7,
            capsize=2,
            label=None if label in drawn else label,
        )
        drawn.add(label)
    if reference == "to_dense":
        axis.set_yscale("log")
    axis.set_ylabel("force MAE (eV/Å)")
    axis.grid(alpha=0.3, which="both")

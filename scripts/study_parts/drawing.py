"""Figure of a pruning study: force MAE against operations, a panel per network and held-out set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equiformer2.pruning.study import DENSE
from equiformer2.training.figures import save_figure
from study_parts.settings import Campaign

_MARKERS = "osD^vP*X<>dp"

Rows = list[dict[str, Any]]


def draw(campaign: Campaign, tables: Mapping[str, Rows], target: Path) -> None:
    """Left of each pair against the dense network's answers, right against labels (dotted: the dense one)."""
    studied = {
        campaign.studies[study].model
        for study, rows in tables.items()
        if any(row["method"] != DENSE for row in rows)
    }
    models = [name for name in campaign.models if name in studied]
    if not models:
        return
    methods = list(
        dict.fromkeys(row["method"] for rows in tables.values() for row in rows if row["method"] != DENSE)
    )
    figure = Figure(figsize=(6 * len(campaign.held_out) * 2, 4.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 2 * len(campaign.held_out), squeeze=False)
    for model, line in zip(models, axes, strict=True):
        rows = [row for name, rows in tables.items() if campaign.studies[name].model == model for row in rows]
        panels = [(name, against) for name in campaign.held_out for against in ("to_dense", "to_labels")]
        for (held_out, reference), axis in zip(panels, line, strict=True):
            _panel(axis, rows, methods, held_out, reference)
            against = "the dense network" if reference == "to_dense" else "labels"
            axis.set_title(f"{model}, {held_out}: against {against}", fontsize=10)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    save_figure(figure, target)


def _panel(axis: Axes, rows: Rows, methods: list[str], held_out: str, reference: str) -> None:
    drawn = set()
    for row in rows:
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
            row["macs_on"][held_out],
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
    axis.set_xlabel("MACs / dense")
    axis.set_ylabel("force MAE (eV/Å)")
    axis.grid(alpha=0.3, which="both")

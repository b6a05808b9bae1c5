"""Figures of a run and of an evaluation, drawn without a display."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from datasets_oc20.untrusted import AnyPath
from equiformer2.files import write_bytes

#: (title, columns of metrics.csv, unit) of the panels of the loss figure.
_PANELS = (
    ("loss", ("train/loss",), ""),
    ("energy MAE", ("train/energy_mae", "val/energy_mae"), "eV"),
    ("force error", ("train/forces_l2", "val/forces_mae"), "eV/Å"),
    ("learning rate", ("lr",), ""),
)


def draw_loss_curves(metrics_csv: AnyPath, target: AnyPath) -> None:
    """Draw loss, errors and learning rate against the step.

    Args:
        metrics_csv: `metrics.csv` of a run; nothing is drawn where it has no rows.
        target: PNG file to write.
    """
    metrics_csv, target = Path(metrics_csv), Path(target)
    if not metrics_csv.exists():
        return
    with metrics_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    panels = [panel for panel in _PANELS if any(row.get(name) for row in rows for name in panel[1])]
    if not panels:
        return
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, (title, columns, unit) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        for name in columns:
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            if points:
                style = "o-" if name.startswith("val/") else "-"
                axis.plot(*np.array(points).T, style, label=name, markersize=3, linewidth=1)
        axis.set(title=title, xlabel="step", ylabel=unit, yscale="log")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    save_figure(figure, target)


def draw_parity(
    target_values: np.ndarray, predicted: np.ndarray, label: str, unit: str, note: str, target: AnyPath
) -> None:
    """Draw predicted against target values, with the diagonal.

    Args:
        target_values, predicted: `[n]` each, in `unit`.
        label: name of the quantity.
        unit: its unit.
        note: title.
        target: PNG file to write.
    """
    target = Path(target)
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axis = figure.subplots()
    draw_diagonal(axis, np.concatenate([target_values, predicted]))
    axis.plot(target_values, predicted, ".", markersize=3, alpha=0.5, rasterized=True)
    axis.set(
        xlabel=f"{label}, target ({unit})",
        ylabel=f"{label}, predicted ({unit})",
        title=note,
    )
    axis.grid(alpha=0.3)
    save_figure(figure, target)


def draw_diagonal(axis: Axes, values: np.ndarray) -> None:
    """Give an axis the same limits in both directions, a little beyond `values`, and draw its diagonal."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (-1.0, 1.0)
    margin = (0.04 * (high - low) or 0.5) if finite.size else 0.0
    low, high = low - margin, high + margin
    axis.plot([low, high], [low, high], color="0.5", linewidth=1)
    axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")


def draw_error_bars(rows: dict[str, dict[str, Any]], title: str, target: AnyPath, most: int = 60) -> None:
    """Draw energy and force errors by row of a `Breakdown`, with the rows' numbers of structures.

    Args:
        rows: `Breakdown.adsorbate_rows` or `element_rows`.
        title: title of the figure.
        target: PNG file to write.
        most: maximum number of rows drawn, the first ones.
    """
    target = Path(target)
    names = list(rows)[:most]
    shown = [
        (key, label)
        for key, label in (
            ("energy_mae", "energy MAE (eV)"),
            ("forces_mae", "force MAE (eV/Å)"),
            ("adsorbate_forces_mae", "force MAE of adsorbate atoms (eV/Å)"),
        )
        if any(key in rows[name] for name in names)
    ]
    figure = Figure(figsize=(3.6 * len(shown) + 1, 1.2 + 0.2 * max(len(names), 4)), layout="constrained")
    labels = [f"{name} ({rows[name]['structures']})" for name in names]
    for number, (axis, (key, label)) in enumerate(
        zip(np.atleast_1d(figure.subplots(1, len(shown), sharey=True)), shown, strict=True)
    ):
        axis.barh(labels, [rows[name].get(key, 0.0) for name in names])
        axis.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
        axis.set_ylabel("" if number else "(structures)")
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(title if len(rows) <= most else f"{title}, first {most} of {len(rows)}")
    save_figure(figure, target)


def save_figure(figure: Figure, target: AnyPath) -> None:
    """Write a figure as PNG, atomically."""
    target = Path(target)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_bytes(target, buffer.getvalue(), make_folder=True)

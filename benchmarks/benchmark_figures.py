"""The report's figures."""

import statistics
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.benchmark_report import EXTRAPOLATED_ATOMS, OPERATION_NAMES
from benchmarks.benchmark_results import baseline, fit_line, median, memory_ratio, records, speed_up
from benchmarks.benchmark_settings import Variant

GREY, BLUE = "#9aa5b1", "#1f77b4"
COLORS = {"reference": GREY, "ours": BLUE}
NAMES = {"reference": "fairchem-core", "ours": "equiformer2"}
LINES = ("-", "--", ":", "-.")
# The parts that measure against the number of atoms, and what a call of theirs is.
ATOMS_AXIS = {"atoms": "seconds per inference", "training_atoms": "seconds per training step"}


def figure(content: dict[str, Any]) -> Figure | None:
    """Bars per measurement: seconds (median, smallest to largest) on the left, peak memory on the right."""
    timings, memory = records(content, "timings"), records(content, "memory")
    if not timings and not memory:
        return None
    pairs = [
        (row, baseline(row["calls"], call), call)
        for row in timings
        for call in row["calls"]
        if call["implementation"] == "ours"
    ]
    compared = [(row, reference, call) for row, reference, call in pairs if reference is not None]
    plot = Figure(figsize=(max(11.0, 1.1 * len(compared) + 4), 4.5), layout="constrained")
    FigureCanvasAgg(plot)
    time_axis, memory_axis = plot.subplots(1, 2, width_ratios=(max(2, len(compared) // 3), 1))
    for place, (row, reference, call) in enumerate(compared):
        for offset, name, shown in ((-0.2, "reference", reference), (0.2, "ours", call)):
            label = NAMES[name] if place == 0 else None
            time_axis.bar(place + offset, median(shown), 0.4, color=COLORS[name], label=label)
            low, high = min(shown["seconds"]), max(shown["seconds"])
            middle = median(shown)
            time_axis.errorbar(
                place + offset, middle, yerr=[[middle - low], [high - middle]], color="black", capsize=3
            )
        top = max(max(reference["seconds"]), max(call["seconds"]))
        text = f"{speed_up(row['calls'], call):.2f}x"
        time_axis.annotate(text, (place, top), (0, 4), textcoords="offset points", ha="center")
    labels = [_time_label(row, call, content) for row, _, call in compared]
    if compared:
        # Sizes and batches differ by a factor of ten and more.
        time_axis.set_yscale("log")
        time_axis.legend(frameon=False)
    time_axis.set_xticks(range(len(labels)), labels, fontsize=8)
    time_axis.set_ylabel("seconds per call")
    time_axis.set_title("Time")
    _memory_bars(memory_axis, memory)
    for axis in (time_axis, memory_axis):
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    return plot


def _time_label(row: dict[str, Any], call: dict[str, Any], content: dict[str, Any]) -> str:
    many = len({other["allocator"] for other in records(content, "timings")}) > 1
    variant = Variant(call["precision"], call["backend"]).label
    lines = [f"{row['size']} {row['batch']}", OPERATION_NAMES[call["operation"]], variant]
    return "\n".join([*lines, row["allocator"]] if many else lines)


def _memory_bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    for place, row in enumerate(rows):
        peaks = {peak["implementation"]: peak for peak in row["peaks"] if peak["backend"] == "auto"}
        for offset, name in ((-0.2, "reference"), (0.2, "ours")):
            if name in peaks:
                axis.bar(place + offset, peaks[name]["peak"] / 2**30, 0.4, color=COLORS[name])
        ratio = memory_ratio(row)
        if ratio is not None:
            top = max(peak["peak"] for peak in peaks.values()) / 2**30
            axis.annotate(f"{ratio:.0%}", (place, top), (0, 4), textcoords="offset points", ha="center")
    axis.set_xticks(range(len(rows)), [f"{row['size']} {row['batch']}" for row in rows], fontsize=8)
    axis.set_ylabel("peak memory, GiB")
    axis.set_title("Memory of a training step")


def atoms_figure(content: dict[str, Any], part: str = "atoms") -> Figure | None:
    """Seconds and peak memory against atoms, both logarithmic, with the fitted memory beyond the points.

    Of inference, or of training steps for the part "training_atoms".
    """
    measured = [row for row in records(content, part) if "seconds" in row]
    if not measured:
        return None
    plot = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(plot)
    time_axis, memory_axis = plot.subplots(1, 2)
    sizes = sorted({row["size"] for row in measured})
    for size in sizes:
        for name in COLORS:
            rows = [row for row in measured if (row["size"], row["implementation"]) == (size, name)]
            rows.sort(key=lambda row: row["atoms"])
            if not rows:
                continue
            atoms = [row["atoms"] for row in rows]
            style = {"color": COLORS[name], "linestyle": LINES[sizes.index(size) % len(LINES)]}
            seconds = [statistics.median(row["seconds"]) for row in rows]
            time_axis.plot(atoms, seconds, marker="o", label=f"{NAMES[name]} {size}", **style)
            memory_axis.plot(
                atoms,
                [row["peak"] / 2**30 for row in rows],
                marker="o",
                label=f"{NAMES[name]} {size}",
                **style,
            )
            if len(rows) > 1:
                slope, intercept = fit_line([(row["atoms"], row["peak"]) for row in rows])
                beyond = [atoms[-1] * (EXTRAPOLATED_ATOMS / atoms[-1]) ** (step / 20) for step in range(21)]
                fitted = [(intercept + slope * x) / 2**30 for x in beyond]
                memory_axis.plot(beyond, fitted, color=COLORS[name], linewidth=0.8, alpha=0.5)
    for axis, title in ((time_axis, ATOMS_AXIS[part]), (memory_axis, "peak memory, GiB")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("atoms")
        axis.set_ylabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    # One for both: among the lines of the other there is no room.
    memory_axis.legend(frameon=False)
    memory_axis.set_title("thin lines: extrapolated, not measured", fontsize=9)
    return plot

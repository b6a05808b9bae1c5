"""The benchmark's table and figure from its results."""

import os
import platform
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.measure import machine_memory

# What the project promises: times faster, and the share of the reference's peak training memory.
SPEED_FLOOR = 1.4
MEMORY_CEILING = 0.6


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, system, and how busy the machine was at this moment."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(machine_memory() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_before": os.getloadavg()[0],
    }


def fastest(variants: dict[str, list[float]]) -> tuple[str, list[float]]:
    """The variant with the smallest median: what a claim is measured against."""
    return min(variants.items(), key=lambda item: statistics.median(item[1]))


def speed_up(row: dict[str, Any]) -> float:
    """Median of the reference's fastest variant over our median."""
    return statistics.median(fastest(row["reference"])[1]) / statistics.median(fastest(row["ours"])[1])


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    machine, settings = results["machine"], results["settings"]
    lines = [
        "# Speed and memory against fairchem-core",
        "",
        f"Written by `{results['command']}`; the numbers are in [benchmark_cpu.json](benchmark_cpu.json).",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']};"
        f" load average before the start {machine['load_average_before']:.1f}."
        f" {settings['threads']} threads, float32. "
        + "; ".join(
            f"{about['name']} {about['version']} (torch {about['torch']}, Python {about['python']})"
            for about in results["implementations"].values()
        )
        + ".",
        "",
        "![Times and memory](benchmark_cpu.png)",
        "",
        *_timing_table(results["timings"], settings["repeats"]),
        *_memory_table(results["memory"]),
        *_answer_table(results["answers"]),
    ]
    if results["left_out"]:
        lines += ["## Left out", "", *(f"- {reason}" for reason in results["left_out"]), ""]
    return "\n".join(lines)


def _timing_table(rows: list[dict[str, Any]], repeats: int) -> list[str]:
    lines = [
        "## Time",
        "",
        f"Seconds: median (smallest to largest, interquartile range) of {repeats} calls, the"
        " implementations in turn, after one warm-up each. A forward includes the search for neighbours. The"
        " reference's forward is timed as shipped, where it keeps the autograd graph in spite of `no_grad`,"
        " and as true `no_grad`; the speed-up is against the faster of the two. A training step is forward,"
        " loss, backward and AdamW, with the paper's dropout.",
        "",
        "| size | batch | operation | allocator | fairchem-core | equiformer2 | speed-up |"
        f" at least {SPEED_FLOOR} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        variants = row["reference"]
        names = {"forward": "true no_grad: ", "forward_as_shipped": "as shipped: "}
        reference = "<br>".join(names.get(name, "") + _spread(values) for name, values in variants.items())
        factor = speed_up(row)
        lines.append(
            f"| {row['size']} | {row['batch']} | {row['operation']} | {row['allocator']} | {reference} |"
            f" {_spread(fastest(row['ours'])[1])} | {factor:.2f} | {_met(factor >= SPEED_FLOOR)} |"
        )
    return [*lines, ""]


def _memory_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Peak memory of a training step",
        "",
        "GiB, peak resident size of a fresh process that loads the network and takes two training steps"
        " (default allocator); in brackets without what the process took before it built the network. The"
        " ratio is that of the whole peaks.",
        "",
        f"| size | batch | fairchem-core | equiformer2 | ratio | at most {MEMORY_CEILING} |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["ours"]["peak"] / row["reference"]["peak"]
        lines.append(
            f"| {row['size']} | {row['batch']} | {_gib(row['reference'])} | {_gib(row['ours'])} |"
            f" {ratio:.2f} | {_met(ratio <= MEMORY_CEILING)} |"
        )
    return [*lines, ""]


def _answer_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Answers, compared before anything was timed",
        "",
        "Same parameters, same structures, dropout off. The reference draws its edge frames at random; its"
        " scatter is the largest distance of one of its draws from their mean, and our difference is the"
        " distance from that mean.",
        "",
        "| size | batch | quantity | difference | the reference's scatter | allowed | rms of the values |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = " | ".join(f"{row[key]:.1e}" for key in ("difference", "scatter", "tolerance", "rms"))
        lines.append(f"| {row['size']} | {row['batch']} | {row['quantity']} | {numbers} |")
    return [*lines, ""]


def _spread(values: list[float]) -> str:
    text = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}"
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        text += f", {high - low:.2f}"
    return text + ")"


def _gib(memory: dict[str, int]) -> str:
    return f"{memory['peak'] / 2**30:.2f} ({(memory['peak'] - memory['before_model']) / 2**30:.2f})"


def _met(met: bool) -> str:
    return "yes" if met else "no"


def figure(results: dict[str, Any]) -> Figure:
    """Bars per measurement: seconds (median, smallest to largest) on the left, peak memory on the right."""
    plot = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(plot)
    time_axis, memory_axis = plot.subplots(1, 2, width_ratios=(2, 1))
    many = len({row["allocator"] for row in results["timings"]}) > 1
    labels = [
        f"{row['size']} {row['batch']}\n{row['operation']}" + (f"\n{row['allocator']}" if many else "")
        for row in results["timings"]
    ]
    seconds = {name: [fastest(row[name])[1] for row in results["timings"]] for name in ("reference", "ours")}
    for offset, (name, color, label) in zip(
        (-0.2, 0.2),
        (("reference", "#9aa5b1", "fairchem-core"), ("ours", "#1f77b4", "equiformer2")),
        strict=True,
    ):
        medians = [statistics.median(values) for values in seconds[name]]
        errors = [
            [median - min(values) for median, values in zip(medians, seconds[name], strict=True)],
            [max(values) - median for median, values in zip(medians, seconds[name], strict=True)],
        ]
        places = [index + offset for index in range(len(medians))]
        time_axis.bar(places, medians, 0.4, yerr=errors, color=color, label=label, capsize=3)
        peaks = [row[name]["peak"] / 2**30 for row in results["memory"]]
        memory_axis.bar([index + offset for index in range(len(peaks))], peaks, 0.4, color=color, label=label)
    for index, row in enumerate(results["timings"]):
        top = max(max(seconds[name][index]) for name in seconds)
        time_axis.annotate(
            f"{speed_up(row):.2f}x", (index, top), (0, 4), textcoords="offset points", ha="center"
        )
    for index, row in enumerate(results["memory"]):
        ratio, top = row["ours"]["peak"] / row["reference"]["peak"], row["reference"]["peak"] / 2**30
        memory_axis.annotate(f"{ratio:.0%}", (index, top), (0, 4), textcoords="offset points", ha="center")
    # Sizes and batches differ by a factor of ten and more.
    time_axis.set_yscale("log")
    time_axis.set_xticks(range(len(labels)), labels, fontsize=8)
    time_axis.set_ylabel("seconds per call")
    time_axis.set_title(f"Time, {results['settings']['threads']} threads, float32")
    memory_axis.set_xticks(
        range(len(results["memory"])),
        [f"{row['size']} {row['batch']}" for row in results["memory"]],
        fontsize=8,
    )
    memory_axis.set_ylabel("peak resident size, GiB")
    memory_axis.set_title("Memory of a training step")
    for axis in (time_axis, memory_axis):
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    time_axis.legend(frameon=False)
    return plot

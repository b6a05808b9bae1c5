"""The report's account of where the time goes."""

import statistics
from typing import Any

from benchmarks.operation_counts import CONVOLVE_1, CONVOLVE_2, PARTS

_LEGEND = (
    "One call under torch's profiler, its operations sorted into parts of the network; the parts add up"
    " to the profiled call, and the plain call beside it says what the profiler costs. GFLOP: matrix"
    " products counted from the shapes, complex products as three real ones; a backward pass counts"
    " twice its forward. GB: float32 inputs and outputs of the part in the forward, each once. Floor:"
    " GFLOP over this machine's measured rate at the shapes of the SO(2) convolutions. Reached: the"
    " part's rate over that rate."
)
_MEMORY_LEGEND = (
    " Memory: the bytes over the measured rate of this machine's memory, two bytes per number in bf16, and"
    " twice those of the forward in a training step (whose backward pass has a gradient for each number, at"
    " least). Limit: which of the two is longer. What neighbouring parts leave each other in the caches"
    " never crosses the memory, so that a part can be faster than the latter."
)


def breakdown_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Per part: share of the time, rate, and the floors that the machine's matrix products and memory set.

    Results that are older than the measurement of the memory's rate have the first floor alone.
    """
    if not rows:
        return []
    memory = _MEMORY_LEGEND if any("bandwidth" in row for row in rows) else ""
    lines = ["## Where our time goes", "", _LEGEND + memory, ""]
    for row in rows:
        rates = "; ".join(
            f"{precision} {rate['rate'] / 1e9:.0f} GFLOP/s (best shape {rate['best'] / 1e9:.0f})"
            for precision, rate in row["rates"].items()
        )
        lines += [
            f"### {row['size']} {row['batch']}: {row['atoms']} atoms, {row['edges']:,} edges",
            "",
            f"Measured rate of matrix products: {rates}.{_memory_sentence(row)}",
            "",
        ]
        for call in row["calls"]:
            lines += _call_table(row, call)
    return lines


def _memory_sentence(row: dict[str, Any]) -> str:
    if "bandwidth" not in row:
        return ""
    rates = ", ".join(f"{name} {row['bandwidth'][name] / 1e9:.1f}" for name in ("copy", "triad"))
    return f" Of memory: {row['bandwidth']['rate'] / 1e9:.1f} GB/s ({rates})."


def _call_table(row: dict[str, Any], call: dict[str, Any]) -> list[str]:
    training = call["operation"] == "training_step"
    rate = row["rates"][call["precision"]]["rate"]
    parts, profiled = call["breakdown"]["parts"], call["breakdown"]["total"]
    flops = {name: counted[0] * (3 if training else 1) for name, counted in row["parts"].items()}
    memory = _memory_floors(row, call)
    seconds = statistics.median(call["seconds"])
    floor = sum(flops.values()) / rate
    convolutions = sum(flops.get(name, 0.0) for name in (CONVOLVE_1, CONVOLVE_2)) / rate
    name = "Training step" if training else "Forward"
    summary = (
        f"{name}, {call['precision']}: {seconds:.3g} s plain, {profiled:.3g} s profiled; floor of all"
        f" matrix products {floor:.3g} s ({floor / seconds:.0%} of the plain call), of the SO(2)"
        f" convolutions alone {convolutions:.3g} s"
    )
    headings = ["part", "forward s", "backward s", "share", "GFLOP", "GB", "floor s"]
    if memory:
        longer = sum(max(work / rate, memory[name]) for name, work in flops.items())
        summary += f"; the longer floor of every part {longer:.3g} s ({longer / seconds:.0%})"
        headings += ["memory s", "limit"]
    lines = [summary + ".", "", _table_row([*headings, "reached"]), "|---" * (len(headings) + 1) + "|"]
    for part in PARTS:
        if part in parts:
            forward, backward = parts[part]
            work, moved = flops.get(part, 0.0), row["parts"].get(part, [0.0, 0.0])[1]
            cells = [part, f"{forward:.3f}", f"{backward:.3f}", f"{(forward + backward) / profiled:.0%}"]
            cells += [_number(work / 1e9), _number(moved / 1e9), _number(work / rate)]
            if memory:
                cells += [_number(memory.get(part, 0.0)), _limit(work / rate, memory.get(part, 0.0))]
            cells.append(f"{work / (forward + backward) / rate:.0%}" if work else "")
            lines.append(_table_row(cells))
    return [*lines, ""]


def _memory_floors(row: dict[str, Any], call: dict[str, Any]) -> dict[str, float]:
    """Seconds in which the memory moves the bytes of every part; empty where its rate was not measured."""
    if "bandwidth" not in row:
        return {}
    passes = 2.0 if call["operation"] == "training_step" else 1.0
    # Counted in float32; what stays in float32 under autocast makes this a lower bound.
    per_number = 0.5 if call["precision"] == "bf16" else 1.0
    scale = passes * per_number / row["bandwidth"]["rate"]
    return {name: counted[1] * scale for name, counted in row["parts"].items()}


def _limit(products: float, memory: float) -> str:
    if not products and not memory:
        return ""
    return "memory" if memory > products else "products"


def _table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.3g}" if value else ""

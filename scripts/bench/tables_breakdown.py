"""The report's account of where the time goes."""

import statistics
from typing import Any

from bench.counting import CONVOLVE_1, CONVOLVE_2, PARTS


def breakdown_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Per part: share of the time, rate, and the floor that the machine's matrix products set."""
    if not rows:
        return []
    lines = [
        "## Where our time goes",
        "",
        "One call under torch's profiler, its operations sorted into parts of the network; the parts add up"
        " to the profiled call, and the plain call beside it says what the profiler costs. GFLOP: matrix"
        " products counted from the shapes, complex products as three real ones; a backward pass counts"
        " twice its forward. GB: float32 inputs and outputs of the part in the forward, each once. Floor:"
        " GFLOP over this machine's measured rate at the shapes of the SO(2) convolutions. Reached: the"
        " part's rate over that rate.",
        "",
    ]
    for row in rows:
        rates = "; ".join(
            f"{precision} {rate['rate'] / 1e9:.0f} GFLOP/s (best shape {rate['best'] / 1e9:.0f})"
            for precision, rate in row["rates"].items()
        )
        lines += [
            f"### {row['size']} {row['batch']}: {row['atoms']} atoms, {row['edges']:,} edges",
            "",
            f"Measured rate of matrix products: {rates}.",
            "",
        ]
        for call in row["calls"]:
            lines += _call_table(row, call)
    return lines


def _call_table(row: dict[str, Any], call: dict[str, Any]) -> list[str]:
    training = call["operation"] == "training_step"
    rate = row["rates"][call["precision"]]["rate"]
    parts, profiled = call["breakdown"]["parts"], call["breakdown"]["total"]
    flops = {name: counted[0] * (3 if training else 1) for name, counted in row["parts"].items()}
    seconds = statistics.median(call["seconds"])
    floor = sum(flops.values()) / rate
    convolutions = sum(flops.get(name, 0.0) for name in (CONVOLVE_1, CONVOLVE_2)) / rate
    name = "Training step" if training else "Forward"
    lines = [
        f"{name}, {call['precision']}: {seconds:.3g} s plain, {profiled:.3g} s profiled; floor of all"
        f" matrix products {floor:.3g} s ({floor / seconds:.0%} of the plain call), of the SO(2)"
        f" convolutions alone {convolutions:.3g} s.",
        "",
        "| part | forward s | backward s | share | GFLOP | GB | floor s | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part in PARTS:
        if part in parts:
            forward, backward = parts[part]
            work, moved = flops.get(part, 0.0), row["parts"].get(part, [0.0, 0.0])[1]
            reached = f"{work / (forward + backward) / rate:.0%}" if work else ""
            lines.append(
                f"| {part} | {forward:.3f} | {backward:.3f} | {(forward + backward) / profiled:.0%} |"
                f" {_number(work / 1e9)} | {_number(moved / 1e9)} | {_number(work / rate)} | {reached} |"
            )
    return [*lines, ""]


def _number(value: float) -> str:
    return f"{value:.3g}" if value else ""

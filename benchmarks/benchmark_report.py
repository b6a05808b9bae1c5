"""The benchmark's report: a table for each part that was measured; an empty part gives no lines."""

import statistics
from typing import Any

from benchmarks.benchmark_results import (
    baseline,
    fit_line,
    median,
    memory_goal,
    memory_ratio,
    peak_of,
    records,
    speed_goal,
    speed_up,
)
from benchmarks.benchmark_settings import Variant
from benchmarks.operation_counts import CONVOLVE_1, CONVOLVE_2, PARTS

EXTRAPOLATED_ATOMS = 100_000
# The paper's inference of the 83M network, samples per second on one V100.
PAPER_THROUGHPUT = {"83M": 13.2}
OPERATION_NAMES = {
    "forward": "forward",
    "forward_as_shipped": "forward, as shipped",
    "training_step": "training step",
    "relaxation_step": "relaxation step",
}
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


def markdown(content: dict[str, Any], name: str, figures: list[str]) -> str:
    """The whole report: a table per part that has been measured.

    Args:
        content: of the store.
        name: of the report's files, without suffix.
        figures: names of the pictures beside it, without suffix.
    """
    units = [unit["record"] for unit in content["units"].values()]
    device = _device(content)
    lines = [
        "# Speed and memory against fairchem-core",
        "",
        f"The numbers are in [{name}.json]({name}.json); [docs/benchmark.md](../benchmark.md) says what is"
        " measured and how.",
        "",
        *_versions(units),
        *(line for figure in figures for line in (f"![{figure}]({figure}.png)", "")),
        *timing_table(records(content, "timings"), device),
        *throughput_table(records(content, "timings")),
        *memory_table(records(content, "memory"), device),
        *relaxation_table(records(content, "relaxation")),
        *breakdown_tables(records(content, "breakdown")),
        *atoms_table(records(content, "atoms")),
        *training_atoms_table(records(content, "training_atoms")),
        *precision_table(records(content, "precision")),
        *answer_table(units),
        *_left_out(units),
        *_runs(content),
    ]
    return "\n".join(lines)


def _device(content: dict[str, Any]) -> str:
    return next((unit["settings"]["device"] for unit in content["units"].values()), "cpu")


def _versions(units: list[dict[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for unit in units:
        for about in unit.get("implementations", {}).values():
            on = "" if about["device"] == "cpu" else f" on {about['device']}"
            text = (
                f"{about['name']} {about['version']} (torch {about['torch']}, Python {about['python']}){on}"
            )
            found[text] = None
    return [f"{'; '.join(sorted(found))}.", ""] if found else []


def _left_out(units: list[dict[str, Any]]) -> list[str]:
    reasons = [reason for unit in units for reason in unit.get("left_out", [])]
    return ["## Left out", "", *(f"- {reason}" for reason in reasons), ""] if reasons else []


def _runs(content: dict[str, Any]) -> list[str]:
    """Return the lines that name the commands, the commits and the load of the machine behind the numbers."""
    lines = [
        "## Runs",
        "",
        "| run | started | commit | measured | machine | load average before | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(content["runs"]):
        names = sorted(name for name, unit in content["units"].items() if unit["run"] == number)
        groups = sorted({"/".join(name.split("/")[:2]) for name in names})
        machine = run["machine"]
        lines.append(
            f"| {number + 1} | {run['started']} | {run['commit'] or 'none'} | {', '.join(groups)} |"
            f" {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB,"
            f" {machine['system']} | {machine['load_average_before']:.1f} | `{run['command']}` |"
        )
    return [*lines, "", "A `+` behind a commit: the package's files differed from it.", ""]


def timing_table(rows: list[dict[str, Any]], device: str) -> list[str]:
    """Forward and training step, with the deviation of the forces beside the speed."""
    if not rows:
        return []
    lines = [
        "## Time",
        "",
        "Seconds: median (smallest to largest, interquartile range) of the calls, the implementations in"
        " turn, after one warm-up each. A forward includes the search for neighbours. The"
        " reference's forward is timed as shipped, where it keeps the autograd graph in spite of `no_grad`,"
        " and as true `no_grad`; the speed-up is against the faster of the two. bf16 and TF32 concern the"
        " inside of the network: bf16 is measured against the reference's fastest precision. A training"
        " step is forward, loss, backward and AdamW, with the paper's dropout. Deviation: rms difference of"
        " energies and of forces from our own float32 answers, relative to their rms.",
        "",
        "| size | batch | operation | allocator | ours in | fairchem-core | equiformer2 | speed-up | goal |"
        " deviation of energies, forces |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for call in row["calls"]:
            if call["implementation"] == "ours":
                lines.append(_timing_row(row, call, device))
    return [*lines, ""]


def _timing_row(row: dict[str, Any], call: dict[str, Any], device: str) -> str:
    operation = call["operation"]
    of_reference = [
        other
        for other in row["calls"]
        if other["implementation"] == "reference" and other["operation"].startswith(operation)
    ]
    against = baseline(row["calls"], call)
    shown = [c for c in of_reference if against is not None and c["precision"] == against["precision"]]
    names = {"forward": "true no_grad: ", "forward_as_shipped": "as shipped: "}
    reference = "<br>".join(names.get(c["operation"], "") + spread(c["seconds"]) for c in shown)
    label = Variant(call["precision"], call["backend"]).label
    factor = speed_up(row["calls"], call)
    deviation = next((d for d in row["deviations"] if d["variant"] == label), None)
    changed = "" if deviation is None else f"{deviation['energy']:.1e}, {deviation['forces']:.1e}"
    return (
        f"| {row['size']} | {row['batch']} | {OPERATION_NAMES[operation]} | {row['allocator']} | {label} |"
        f" {reference} | {spread(call['seconds'])} | {'' if factor is None else f'{factor:.2f}'} |"
        f" {_goal(factor, speed_goal(device, row['size'], call))} | {changed} |"
    )


def throughput_table(rows: list[dict[str, Any]]) -> list[str]:
    """Structures per second of a forward, beside the paper's number."""
    lines = [
        "## Inference throughput",
        "",
        "Structures per second, from the median forward; structures of 70 to 79 atoms."
        f" The paper's 83M network: {PAPER_THROUGHPUT['83M']} per second on one V100.",
        "",
        "| size | batch | implementation | precision | structures/s | times the paper's |",
        "|---|---|---|---|---|---|",
    ]
    found = False
    for row in rows:
        for call in row["calls"]:
            if call["operation"] == "forward":
                found = True
                rate = row["structures"] / median(call)
                paper = PAPER_THROUGHPUT.get(row["size"])
                times = "" if paper is None else f"{rate / paper:.2f}"
                label = Variant(call["precision"], call["backend"]).label
                lines.append(
                    f"| {row['size']} | {row['batch']} | {_name(call['implementation'])} | {label} |"
                    f" {rate:.3g} | {times} |"
                )
    return [*lines, ""] if found else []


def memory_table(rows: list[dict[str, Any]], device: str) -> list[str]:
    """Peak memory of a training step."""
    if not rows:
        return []
    kind = (
        "peak resident size of a fresh process that loads the network and takes two training steps"
        " (default allocator); in brackets without what the process took before it built the network. The"
        " ratio is that of the whole peaks."
        if device == "cpu"
        else "most memory that tensors took on the GPU in a fresh process that takes two training steps."
    )
    lines = [
        "## Peak memory of a training step",
        "",
        f"GiB, {kind}",
        "",
        "| size | batch | ours with | fairchem-core | equiformer2 | ratio | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reference = peak_of(row, "reference")
        for peak in row["peaks"]:
            if peak["implementation"] == "ours":
                ratio = memory_ratio(row, peak["backend"])
                goal = memory_goal(device, row["size"])
                verdict = ""
                if ratio is not None and goal is not None:
                    verdict = f"at most {goal:.2f}: {_met(ratio <= goal)}"
                lines.append(
                    f"| {row['size']} | {row['batch']} | {peak['backend']} | {_gib(reference)} |"
                    f" {_gib(peak)} | {'' if ratio is None else f'{ratio:.2f}'} | {verdict} |"
                )
    return [*lines, ""]


def relaxation_table(rows: list[dict[str, Any]]) -> list[str]:
    """Seconds per step through the calculators."""
    if not rows:
        return []
    lines = [
        "## Relaxation step through the calculator",
        "",
        "Seconds per step of FIRE on the first slab (lower layers held): ASE, conversion, graph, network."
        " Ours is `EquiformerV2Calculator` with a checkpoint of the same parameters; the reference is its"
        " network in a minimal ASE calculator (true `no_grad`, its own graph), because fairchem's cannot"
        " take a network in memory. Steps in turn after one warm-up; energy and forces of the start"
        " structure were compared.",
        "",
        "| size | atoms | ours in | fairchem-core | equiformer2 | speed-up | deviation of energies, forces |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for call in row["calls"]:
            if call["implementation"] == "ours":
                label = Variant(call["precision"], call["backend"]).label
                against, factor = baseline(row["calls"], call), speed_up(row["calls"], call)
                deviation = next((d for d in row["deviations"] if d["variant"] == label), None)
                changed = "" if deviation is None else f"{deviation['energy']:.1e}, {deviation['forces']:.1e}"
                lines.append(
                    f"| {row['size']} | {row['atoms']} | {label} |"
                    f" {'' if against is None else spread(against['seconds'])} | {spread(call['seconds'])} |"
                    f" {'' if factor is None else f'{factor:.2f}'} | {changed} |"
                )
    return [*lines, ""]


def atoms_table(rows: list[dict[str, Any]]) -> list[str]:
    """Time and memory of inference against atoms, and the fitted memory per atom."""
    about = (
        "Inference (float32, `no_grad`) of one structure: supercells of the first slab without its adsorbate."
    )
    return _against_atoms(rows, "Against the number of atoms", about)


def training_atoms_table(rows: list[dict[str, Any]]) -> list[str]:
    """The same of training steps."""
    about = "Training steps (float32) with the same structures, each a batch of its own."
    return _against_atoms(rows, "Training against the number of atoms", about)


def _against_atoms(rows: list[dict[str, Any]], title: str, about: str) -> list[str]:
    measured = [row for row in rows if "seconds" in row]
    if not measured:
        return []
    lines = [
        f"## {title}",
        "",
        f"{about} Seconds as above; peak GiB of a fresh process per point, in brackets without what it took"
        " before it built the network.",
        "",
        "| size | atoms | implementation | seconds | peak GiB |",
        "|---|---|---|---|---|",
    ]
    series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in measured:
        series.setdefault((row["size"], row["implementation"]), []).append(row)
    for (size, implementation), points in series.items():
        for row in sorted(points, key=lambda row: row["atoms"]):
            lines.append(
                f"| {size} | {row['atoms']:,} | {_name(implementation)} | {spread(row['seconds'])} |"
                f" {_gib(row)} |"
            )
    lines += [
        "",
        f"Straight lines through the peaks, and **extrapolated, not measured,** to {EXTRAPOLATED_ATOMS:,}"
        " atoms (seconds in proportion to the largest measured structure):",
        "",
        "| size | implementation | largest measured | MiB per atom | GiB at"
        f" {EXTRAPOLATED_ATOMS:,} (extrapolated) | seconds at {EXTRAPOLATED_ATOMS:,} (extrapolated) |",
        "|---|---|---|---|---|---|",
    ]
    for (size, implementation), points in series.items():
        if len(points) > 1:
            slope, intercept = fit_line([(row["atoms"], row["peak"]) for row in points])
            largest = max(points, key=lambda row: row["atoms"])
            seconds = statistics.median(largest["seconds"]) * EXTRAPOLATED_ATOMS / largest["atoms"]
            lines.append(
                f"| {size} | {_name(implementation)} | {largest['atoms']:,} | {slope / 2**20:.3g} |"
                f" {(intercept + slope * EXTRAPOLATED_ATOMS) / 2**30:.3g} | {seconds:.3g} |"
            )
    return [*lines, ""]


def precision_table(rows: list[dict[str, Any]]) -> list[str]:
    """Deviations of other precisions and backends on real structures."""
    if not any(row["deviations"] for row in rows):
        return []
    lines = [
        "## Deviations on real structures",
        "",
        "First frames of four OC20 relaxations; against float32 with the torch backend, same parameters:"
        " rms of the differences over the rms of the values, and the largest difference (eV and eV/Å for a"
        " trained network, the network's units for one with random parameters).",
        "",
        "| size | parameters | ours in | energies, relative | forces, relative | energies, largest |"
        " forces, largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for found in row["deviations"]:
            parameters = "trained" if row["trained"] else "random"
            numbers = (found[key] for key in ("energy", "forces", "energy_largest", "forces_largest"))
            text = " | ".join(f"{number:.1e}" for number in numbers)
            lines.append(f"| {row['size']} | {parameters} | {found['variant']} | {text} |")
    return [*lines, ""]


def answer_table(units: list[dict[str, Any]]) -> list[str]:
    """The comparisons that came before the timings."""
    compared = [unit for unit in units if unit.get("answers")]
    if not compared:
        return []
    lines = [
        "## Answers, compared before anything was timed",
        "",
        "Same parameters, same structures, dropout off. The reference draws its edge frames at random; its"
        " scatter is the largest distance of one of its draws from their mean, and our difference is the"
        " distance from that mean.",
        "",
        "| size | batch | ours in | quantity | difference | the reference's scatter | allowed |"
        " rms of the values |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for unit in compared:
        for row in unit["answers"]:
            numbers = " | ".join(f"{row[key]:.1e}" for key in ("difference", "scatter", "tolerance", "rms"))
            batch = unit.get("batch", "start of relaxation")
            lines.append(f"| {unit['size']} | {batch} | {row['variant']} | {row['quantity']} | {numbers} |")
    return [*lines, ""]


def spread(values: list[float]) -> str:
    """`median (smallest to largest, interquartile range)`."""
    text = f"{_short(statistics.median(values))} ({_short(min(values))} to {_short(max(values))}"
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        text += f", {_short(high - low)}"
    return text + ")"


def _short(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3f}"


def _goal(factor: float | None, goal: float | None) -> str:
    return "" if factor is None or goal is None else f"at least {goal}: {_met(factor >= goal)}"


def _met(met: bool) -> str:
    return "yes" if met else "no"


def _gib(memory: dict[str, int] | None) -> str:
    if memory is None:
        return "not measured"
    return f"{memory['peak'] / 2**30:.2f} ({(memory['peak'] - memory['before_model']) / 2**30:.2f})"


def _name(implementation: str) -> str:
    return {"reference": "fairchem-core", "ours": "equiformer2"}[implementation]


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

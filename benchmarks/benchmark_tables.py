"""Tables of the report, one function per part; an empty part gives no lines."""

import statistics
from typing import Any

from benchmarks.benchmark_settings import Variant
from benchmarks.part_atoms import fit_line
from benchmarks.part_memory import peak_of
from benchmarks.ratios import baseline, median, memory_goal, memory_ratio, speed_goal, speed_up

EXTRAPOLATED_ATOMS = 100_000
# The paper's inference of the 83M network, samples per second on one V100.
PAPER_THROUGHPUT = {"83M": 13.2}
OPERATION_NAMES = {
    "forward": "forward",
    "forward_as_shipped": "forward, as shipped",
    "training_step": "training step",
    "relaxation_step": "relaxation step",
}


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

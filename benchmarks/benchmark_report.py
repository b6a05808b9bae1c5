"""The benchmark's report from its results."""

from typing import Any

from benchmarks.benchmark_results import records
from benchmarks.benchmark_tables import (
    answer_table,
    atoms_table,
    memory_table,
    precision_table,
    relaxation_table,
    throughput_table,
    timing_table,
    training_atoms_table,
)
from benchmarks.tables_breakdown import breakdown_tables


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
    """Which command measured what, on which commit and how busy a machine."""
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

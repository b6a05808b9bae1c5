"""Table, figure and verdicts of a pruning study: docs/results/pruning_study.*."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equiformer2.files import write_bytes, write_json
from equiformer2.pruning.study import DENSE, SCRATCH, TIMED
from equiformer2.pruning.study_report import markdown, missed, summarise
from study_parts.drawing import draw
from study_parts.published import PUBLISHED
from study_parts.settings import Campaign
from study_parts.stopwatch import in_words, read_seconds

NAME = "pruning_study"
_READING = (
    "The column *time* is of single forward passes between other work; the times to go by are those of",
    "[force calls](#force-calls-through-the-calculator). In the figure open marks are as cut, filled ones",
    "are trained afterwards, bars are standard deviations over seeds.",
)
_WORSE = 1.05
_FASTER = 1.6
_BASELINES = ("route_random", "route_uniform", "route_distance")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One thing that was to be shown: the question, what was measured and whether it holds."""

    question: str
    measured: str
    holds: bool


def write_study(campaign: Campaign, out: Path, results: Path) -> list[Path]:
    """Write the report of what is there; parts that are missing are named in it."""
    found = {name: _results(out / name) for name in campaign.studies}
    tables = {name: summarise(items) for name, items in found.items() if items}
    speed, lossless = _records(out / "speed"), _records(out / "lossless")
    verdicts = [
        *_lossless_verdicts(lossless),
        *[v for name, rows in tables.items() for v in _router_verdicts(campaign, name, rows)],
        *[v for name, rows in tables.items() for v in _distilled_verdicts(campaign, name, rows)],
        *_speed_verdicts(campaign, speed),
    ]
    text = [f"![study]({NAME}.png)", "", "Written by `python scripts/pruning_study.py`.", *_READING, ""]
    text += [in_words(seconds), ""] if (seconds := read_seconds(out)) else []
    text += _verdict_table(verdicts)
    for name, rows in tables.items():
        part = campaign.studies[name]
        text += [
            f"# {name} (network {part.model})",
            "",
            _to_labels(rows),
            markdown(rows),
            missed(found[name]),
        ]
        unfinished = _unfinished(campaign, name, found[name])
        if unfinished:
            text += [f"Not computed: {', '.join(unfinished)}.", ""]
    text += _lossless_table(lossless) + _speed_table(speed) + _published_table()
    content = {
        "verdicts": [vars(verdict) for verdict in verdicts],
        "studies": tables,
        "speed": speed,
        "lossless": lossless,
        "seconds": seconds,
    }
    write_json(results / f"{NAME}.json", content, make_folder=True)
    write_bytes(results / f"{NAME}.md", "\n".join(text).encode())
    draw(campaign, tables, results / f"{NAME}.png")
    return [results / f"{NAME}.{ending}" for ending in ("md", "json", "png")]


def _results(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "results").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _records(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _unfinished(campaign: Campaign, name: str, found: Sequence[dict[str, Any]]) -> list[str]:
    part = campaign.studies[name]
    methods = list(part.methods) + ([SCRATCH] if part.distill is not None and part.distill.scratch else [])
    done = {(item["method"], item["keep"], item["seed"]) for item in found}
    return [
        f"{method} at {keep:.0%}, seed {seed}"
        for method in methods
        for keep in part.keep
        for seed in campaign.seeds
        if (method, keep, seed) not in done and method != "route_context_only"
    ]


def _row(rows: Rows, method: str, keep: float, trained: str) -> dict[str, Any] | None:
    for row in rows:
        if (row["method"], row["keep"], row["trained"]) == (method, keep, trained):
            return row
    return None


def _mae(row: dict[str, Any], held_out: str, reference: str) -> float:
    return float(row["errors"][held_out][reference]["force_mae"]["mean"])


def _lossless_verdicts(lossless: dict[str, Any]) -> list[Verdict]:
    verdicts = []
    for name, record in lossless.items():
        last = record["savings"][-1]
        ratio, deviation = last["latency"]["ratio"], last["force_deviation"]
        verdicts.append(
            Verdict(
                f"{name}: lossless tier, identical forces and time saved",
                f"time {ratio:.2f} of the whole, largest force difference {deviation:.1e} eV/Å",
                ratio < 1 and deviation < 1e-5,
            )
        )
    return verdicts


def _router_verdicts(campaign: Campaign, name: str, rows: Rows) -> list[Verdict]:
    """Of FTP's trained router, and of the static one at a searched schedule, which is its first stage."""
    dense = _row(rows, DENSE, 1.0, "cut")
    verdicts = []
    for keep, method, held_out in itertools.product(
        campaign.studies[name].keep, ("route_ftp", "route_static"), campaign.held_out
    ):
        row = _row(rows, method, keep, "cut")
        if dense is None or row is None:
            continue
        title = f"{name}, {held_out}, {method}"
        ratio = _mae(row, held_out, "to_labels") / _mae(dense, held_out, "to_labels")
        verdicts.append(
            Verdict(
                f"{title}: {keep:.0%} of the MACs, force MAE at most 5 % worse",
                f"{ratio - 1:+.1%} (MACs {row['macs_on'][held_out]:.1%})",
                ratio <= _WORSE,
            )
        )
        own = _mae(row, held_out, "to_dense")
        others = {m: _row(rows, m, keep, "cut") for m in _BASELINES}
        errors = {m: _mae(other, held_out, "to_dense") for m, other in others.items() if other is not None}
        if len(errors) < len(_BASELINES):
            continue  # the page lists what has not been computed
        told = ", ".join(f"{m.removeprefix('route_')} {value:.4f}" for m, value in errors.items())
        verdicts.append(
            Verdict(
                f"{title}: nearer to the dense network than random, uniform and distance",
                f"{own:.4f} eV/Å against {told}",
                own < min(errors.values()),
            )
        )
    return verdicts


def _distilled_verdicts(campaign: Campaign, name: str, rows: Rows) -> list[Verdict]:
    dense = _row(rows, DENSE, 1.0, "cut")
    verdicts = []
    for keep, method in itertools.product(campaign.studies[name].keep, ("multi", TIMED)):
        pruned = _row(rows, method, keep, "distilled")
        # The plans that are trained from scratch are those of `multi`.
        scratch = _row(rows, SCRATCH, keep, "distilled") if method == "multi" else None
        if dense is None or pruned is None:
            continue
        for held_out in campaign.held_out:
            own = _mae(pruned, held_out, "to_labels")
            ratio = own / _mae(dense, held_out, "to_labels")
            verdicts.append(
                Verdict(
                    f"{name}, {held_out}, {method}: {keep:.0%} of the MACs, distilled, "
                    "force MAE at most 5 % worse",
                    f"{ratio - 1:+.1%} (MACs {pruned['macs']:.1%})",
                    ratio <= _WORSE,
                )
            )
            if scratch is not None:
                other = _mae(scratch, held_out, "to_labels")
                verdicts.append(
                    Verdict(
                        f"{name}, {held_out}: better than the same size from scratch, equally long",
                        f"{own:.4f} against {other:.4f} eV/Å",
                        own < other,
                    )
                )
    return verdicts


def _speed_verdicts(campaign: Campaign, speed: dict[str, Any]) -> list[Verdict]:
    verdicts = []
    for name, record in speed.items():
        if not name.endswith(("_multi", f"_{TIMED}", "_random_weights_uniform", "_random_weights_blocks")):
            continue
        faster = 1 / record["latency"]["ratio"]
        verdicts.append(
            Verdict(
                f"{name}: force call through the calculator at {campaign.speed.keep:.0%} of the MACs, "
                f"{_FASTER} times as fast",
                f"{faster:.2f} times",
                faster >= _FASTER,
            )
        )
    return verdicts


def _verdict_table(verdicts: Sequence[Verdict]) -> list[str]:
    rows = [f"| {v.question} | {v.measured} | {'yes' if v.holds else '**no**'} |" for v in verdicts]
    return ["| to be shown | measured | holds |", "|---|---|---|", *rows, ""]


def _to_labels(rows: Rows) -> str:
    dense = _row(rows, DENSE, 1.0, "cut")
    if dense is None:
        return ""
    told = [
        f"{name}: {_mae(dense, name, 'to_labels'):.4f} eV/Å"
        for name, errors in dense["errors"].items()
        if errors["to_labels"] is not None
    ]
    return f"Force MAE of the dense network against labels: {'; '.join(told)}.\n"


def _lossless_table(lossless: dict[str, Any]) -> list[str]:
    lines = [
        "# Lossless tier",
        "",
        "| network | left out | MACs | time (quartiles) | largest force difference |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name, record in lossless.items():
        for saving in record["savings"]:
            time = saving["latency"]
            difference = saving["force_deviation"]
            told = "" if difference is None else f"{difference:.1e} eV/Å"
            lines.append(
                f"| {name} | {saving['name']} | {saving['macs'] / saving['macs_without_cut']:.3f} "
                f"| {time['ratio']:.2f} ({time['low']:.2f} to {time['high']:.2f}) | {told} |"
            )
    return [*lines, ""]


def _speed_table(speed: dict[str, Any]) -> list[str]:
    lines = ["# Force calls through the calculator", ""]
    lines += ["Interleaved with the dense network's; every call is for slightly other positions.", ""]
    lines += [
        "| network and way | atoms | threads | MACs | dense (s) | cheaper (s) | times as fast (quartiles) |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, record in speed.items():
        time = record["latency"]
        macs = "" if record["macs"] is None else f"{record['macs']:.1%}"
        fast = np.reciprocal([time["ratio"], time["high"], time["low"]])
        lines.append(
            f"| {name} | {record['atoms']} | {record['threads']} | {macs} | {time['dense_seconds']:.3f} "
            f"| {time['seconds']:.3f} | {fast[0]:.2f} ({fast[1]:.2f} to {fast[2]:.2f}) |"
        )
    return [*lines, ""]


def _published_table() -> list[str]:
    lines = ["# Beside the published figures", ""]
    lines += [
        "The papers prune language and vision models: other networks, data and scores. Read them as such.",
        "",
    ]
    lines += ["| method | domain | published | source |", "|---|---|---|---|"]
    lines += [f"| {p.method} | {p.domain} | {p.figures} | {p.source} |" for p in PUBLISHED]
    return [*lines, ""]

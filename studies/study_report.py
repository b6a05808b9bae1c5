"""Page, results file and figures of a pruning study: docs/results/pruning_study.*."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equiformer2.errors import InputError
from equiformer2.files import read_json, write_bytes, write_json
from equiformer2.pruning.analysis.pareto import DENSE, NO_BUDGET, PREFIX, planned_results
from equiformer2.pruning.analysis.pareto_report import markdown, missed, summarise
from equiformer2.script import origin
from studies.campaign import OTHER_METHODS, Campaign
from studies.stopwatch import in_words, read_seconds
from studies.study_figures import draw, draw_times
from studies.verdicts import Rows, Verdict, mae_of, row_of, verdicts

_READING = (
    "Figures: errors against operations, and against the measured time of a",
    "[force call](#force-calls-through-the-calculator). Bars are standard deviations over seeds.",
)
_PUBLISHED = "# Beside the published figures"
_MARKS = "Open marks are as cut, filled ones are trained afterwards."


@dataclass(frozen=True)
class Published:
    """Figures that a paper gives in its abstract for its own domain: context, not our claims.

    Attributes:
        ours: method and state of training in our studies, whose figures stand beside.
    """

    method: str
    domain: str
    figures: str
    source: str
    ours: tuple[tuple[str, str], ...]


PUBLISHED = (
    Published(
        "FTP (trained token router)",
        "language models (LLaMA2-7B, Qwen1.5-7B)",
        "keeps about 10 points more accuracy than BlockPruner and ShortGPT at comparable token sparsity",
        "abstract of arXiv 2412.11494",
        (("route_ftp", "cut"),),
    ),
    Published(
        "Zero-TPrune",
        "image classification (DeiT-S on ImageNet)",
        "34.7 % fewer operations, 45.3 % more throughput, 0.4 % accuracy lost, untrained",
        "abstract of the CVPR 2024 paper, arXiv 2305.17328",
        (("route_atom", "cut"), ("route_edge", "cut")),
    ),
    Published(
        "MultiPruner",
        "language models (Llama2-7B, 22 % of the parameters cut)",
        "mean accuracy 68.96 to 62.83 untrained, 64.18 after tuning",
        "repository of the paper, arXiv 2501.09949",
        (("multi", "cut"), ("multi", "distilled")),
    ),
    Published(
        "BlockPruner",
        "language models (Llama3.1-8B, 20 % cut)",
        "59.08 where MultiPruner reaches 63.07",
        "repository of MultiPruner",
        (("block", "cut"), ("block_filled", "cut")),
    ),
    Published(
        "PhAST (without subsurface atoms, or super-nodes)",
        "OC20, direct prediction of relaxed energies, trained that way",
        "3 to 8 times less compute, energy MAE 4 to 42 % better for the whole bundle of its changes",
        "README of vict0rsch/phast, arXiv 2211.12020",
        (("route_context_only", "cut"),),
    ),
    Published(
        "Structural pruning of channels and orders (Compact SO(3) models)",
        "atomistic: MACE-MP and MACE-OFF, trained on after the cut",
        "better than the official small model (from scratch) in 7 of 9 metrics of Matbench Discovery; "
        "1.5 to 4 times fewer parameters, 2.5 to 4 times less compute than pre-training the small one",
        "abstract of arXiv 2605.08885",
        (("multi", "distilled"), ("multi_time", "distilled")),
    ),
    Published(
        "Fewer interaction blocks (efficient JMP)",
        "atomistic: JMP-L, fine-tuned on molecular properties after the cut",
        "two blocks fewer: 32 % fewer parameters, 1.3 times the throughput, a minimal loss",
        "abstract of arXiv 2504.19538",
        (("block", "cut"), ("block_filled", "cut")),
    ),
)


def write_study(campaign: Campaign, out: Path, results: Path) -> list[Path]:
    """Write the report of what is there, with the pages of other studies; missing parts are named in it."""
    name = campaign.name
    found = {study: _results(out / study) for study in campaign.studies}
    tables = {study: summarise(items) for study, items in found.items() if items}
    speed, lossless = _records(out / "speed"), _records(out / "lossless")
    found_verdicts = verdicts(campaign, tables, lossless, speed)
    text = [f"# Pruning of {', '.join(campaign.models)}", "", f"![errors against operations]({name}.png)"]
    timed = draw_times(campaign, tables, speed, results / f"{name}_time.png")
    text += [f"![errors against time]({name}_time.png)"] * timed + [""]
    text += ["Written by `python -m studies.pruning`.", *_READING]
    is_trained = any(row["trained"] == "distilled" for rows in tables.values() for row in rows)
    text += [_MARKS if is_trained else "No network is trained after a cut.", ""]
    text += [in_words(seconds), ""] if (seconds := read_seconds(out)) else []
    text += _verdict_table(found_verdicts)
    for study, rows in tables.items():
        part = campaign.studies[study]
        text += [
            f"# {study} (network {part.model})",
            "",
            _to_labels(rows),
            markdown(rows, times=False),
            missed(found[study]),
        ]
        unfinished = _unfinished(campaign, study, found[study])
        if unfinished:
            text += [f"Not computed: {', '.join(unfinished)}.", ""]
    text += _lossless_table(lossless) + _speed_table(speed)
    for study in campaign.other_methods:
        text += _own_study(results, study, OTHER_METHODS[study])
    text += _published_table(campaign, tables, speed)
    content = {
        **origin(),
        "verdicts": [vars(verdict) for verdict in found_verdicts],
        "studies": tables,
        "speed": speed,
        "lossless": lossless,
        "seconds": seconds,
    }
    write_json(results / f"{name}.json", content, make_folder=True)
    write_bytes(results / f"{name}.md", "\n".join(text).encode())
    draw(campaign, tables, results / f"{name}.png")
    written = [results / f"{name}.{ending}" for ending in ("md", "json", "png")]
    if timed:
        written.append(results / f"{name}_time.png")
    return written


def renew_other_methods(campaign: Campaign, results: Path) -> Path:
    """Take the present pages of other studies into a report, whose own runs may be gone.

    Args:
        campaign: whose report was written before.
        results: its folder.

    Returns:
        The report.

    Raises:
        InputError: there is no report, or it has no section of the other studies.
    """
    page = results / f"{campaign.name}.md"
    if not page.is_file():
        raise InputError(f"{page} is not there: write it with --parts report")
    text = page.read_text(encoding="utf-8")
    sections = [_own_study(results, study, OTHER_METHODS[study]) for study in campaign.other_methods]
    before, found, rest = text.partition(f"\n{sections[0][0]}\n") if sections else (text, "", "")
    _, after, published = rest.partition(f"\n{_PUBLISHED}\n")
    if not (found and after):
        raise InputError(f"{page} has no section of another study: write it with --parts report")
    new = [line for section in sections for line in section]
    write_bytes(page, "\n".join([before, *new, f"{_PUBLISHED}\n{published}"]).encode())
    return page


def _own_study(results: Path, study: str, what: str) -> list[str]:
    """Section of a method with a study of its own: its verdicts, and its page as it is."""
    page, numbers = results / f"{study}.md", results / f"{study}.json"
    if not (page.is_file() and numbers.is_file()):
        return [f"# {what}", "", f"Not computed: `python -m studies.{study}`.", ""]
    first, *rest = page.read_text(encoding="utf-8").strip().split("\n")
    title = first.removeprefix("# ") if first.startswith("# ") else what
    made = read_json(numbers)
    return [f"# {title}", "", f"From `{made.get('command')}`, commit {made.get('commit')}.", *rest, ""]


def _results(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "results").glob("*.json"))
    return [read_json(path) for path in paths]


def _records(folder: Path) -> dict[str, Any]:
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def _unfinished(campaign: Campaign, name: str, found: Sequence[dict[str, Any]]) -> list[str]:
    planned = planned_results(campaign.settings(name), campaign.trains_from_scratch(name))
    done = {(item["method"], item["keep"], item["seed"]) for item in found}
    return [
        f"{method} at {keep:.0%}, seed {seed}"
        for method, keep, seed in planned.values()
        if (method, keep, seed) not in done
    ]


def _verdict_table(found: Sequence[Verdict]) -> list[str]:
    rows = [f"| {v.question} | {v.measured} | {'yes' if v.holds else '**no**'} |" for v in found]
    return ["| to be shown | measured | holds |", "|---|---|---|", *rows, ""]


def _to_labels(rows: Rows) -> str:
    dense = row_of(rows, DENSE, 1.0, "cut")
    if dense is None:
        return ""
    told = [
        f"{name}: {mae_of(dense, name, 'to_labels'):.4f} eV/Å"
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
        "| network and way | atoms | threads | MACs | dense (s) | cheaper (s) | times as fast (quartiles) "
        "| peak memory / dense |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, record in speed.items():
        time = record["latency"]
        macs = "" if record["macs"] is None else f"{record['macs']:.1%}"
        fast = np.reciprocal([time["ratio"], time["high"], time["low"]])
        lines.append(
            f"| {name} | {record['atoms']} | {record['threads']} | {macs} | {time['dense_seconds']:.3f} "
            f"| {time['seconds']:.3f} | {fast[0]:.2f} ({fast[1]:.2f} to {fast[2]:.2f}) "
            f"| {record['peak_bytes'] / 2**20:.1f} / {record['dense_peak_bytes'] / 2**20:.1f} MiB |"
        )
    return [*lines, ""]


def _published_table(campaign: Campaign, tables: dict[str, Rows], speed: dict[str, Any]) -> list[str]:
    lines = [_PUBLISHED, ""]
    lines += [
        "The papers prune other networks (language, vision and, where said, atoms), on other data and by",
        "other scores; ours are of small networks on OC20. Read them as such.",
        "",
    ]
    lines += ["| method | domain | published | source | ours |", "|---|---|---|---|---|"]
    for p in PUBLISHED:
        ours = "; ".join(told for kind in p.ours for told in _ours(campaign, tables, speed, *kind))
        lines.append(f"| {p.method} | {p.domain} | {p.figures} | {p.source} | {ours or 'not computed'} |")
    return [*lines, ""]


def _ours(
    campaign: Campaign, tables: dict[str, Rows], speed: dict[str, Any], method: str, trained: str
) -> list[str]:
    """A phrase per study with the method: MACs, force MAE beside the dense network's, time of a call."""
    told = []
    for name, rows in tables.items():
        dense = row_of(rows, DENSE, 1.0, "cut")
        model = campaign.studies[name].model
        for keep in campaign.studies[name].keep:
            row = row_of(rows, method, 1.0 if method == NO_BUDGET else keep, trained)
            if dense is None or row is None:
                continue
            worse = " / ".join(
                f"{mae_of(row, part, 'to_labels') / mae_of(dense, part, 'to_labels') - 1:+.1%} {part}"
                for part in campaign.held_out
            )
            words = f"{method} ({model}{', distilled' if trained == 'distilled' else ''}): "
            words += f"{row['macs']:.0%} of the MACs, force MAE {worse}"
            call = speed.get(f"{model}_{method}")
            if call is not None and (keep == campaign.speed.keep or method.startswith(PREFIX)):
                words += f", a force call {1 / call['latency']['ratio']:.2f} times as fast"
            if words not in told:
                told.append(words)
    return told

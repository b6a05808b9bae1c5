"""Page, verdicts and figure of the study of experts (`studies.experts`)."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from equiformer2.experts.scores import METHODS
from equiformer2.training.figures import save_figure
from studies.expert_tasks import KINDS, kind_of
from studies.results import Row, write_page
from studies.verdicts import Verdict

TITLES = {"joint": "one network of experts", "single": "a network per task", "two_stage": "two stages"}
_WORSE = 1.02
_TOP1 = 0.95
_HALF = 0.5

Rows = Sequence[Row]


def report(rows: Rows, results: Path) -> None:
    """Write page, numbers and figure of all rows.

    Args:
        rows: that there are.
        results: path without ending.
    """
    found, figure = verdicts(rows), results.with_suffix(".png")
    results.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, figure)
    told = [vars(verdict) for verdict in found]
    write_page(results, rows, markdown(rows, found, figure.name), verdicts=told)


def of_part(rows: Rows, part: str) -> list[Row]:
    """Select the rows of a part."""
    return [row for row in rows if row["part"] == part]


def force_errors(rows: Rows, part: str) -> dict[int, dict[str, float]]:
    """Collect force MAE, eV/Å, by seed and task; seeds with all tasks that there are."""
    found: dict[int, dict[str, float]] = {}
    for row in of_part(rows, part):
        own = {task: errors["force_mae_eV_A"] for task, errors in row["errors"].items()}
        found.setdefault(row["seed"], {}).update(own)
    every = {task for row in rows for task in row.get("errors", {})}
    return {seed: errors for seed, errors in found.items() if errors.keys() == every}


def entries(rows: Rows, method: str, keep: float, kind: str | None = None) -> list[Row]:
    """Select the entries of a method at a share of the experts, of all tasks (of one kind) and seeds."""
    return [
        entry
        for row in of_part(rows, "prune")
        for entry in row["entries"]
        if (entry["method"], entry["keep"]) == (method, keep) and kind in (None, kind_of(row["task"]))
    ]


def verdicts(rows: Rows) -> list[Verdict]:
    """Judge what the study is to show, as far as there are rows."""
    return [*_training_verdicts(rows), *_pruning_verdicts(rows), *_retrieval_verdicts(rows)]


def _training_verdicts(rows: Rows) -> list[Verdict]:
    found = []
    joint = force_errors(rows, "joint")
    for part in ("single", "two_stage"):
        other = force_errors(rows, part)
        seeds = sorted(joint.keys() & other.keys())
        kinds = sorted({kind_of(task) for errors in joint.values() for task in errors})
        for kind in kinds:
            pairs = [_mean_pair(joint[seed], other[seed], kind) for seed in seeds]
            if not pairs:
                continue
            told = ", ".join(f"{mine:.4f} against {theirs:.4f}" for mine, theirs in pairs)
            holds = statistics.fmean(mine for mine, _ in pairs) < statistics.fmean(
                theirs for _, theirs in pairs
            )
            question = f"{kind} frames: better than {TITLES[part]} in equal time (force MAE, eV/Å)"
            found.append(Verdict(question, f"{told} ({len(seeds)} seeds)", holds))
    return found


def _mean_pair(mine: Mapping[str, float], theirs: Mapping[str, float], kind: str) -> tuple[float, float]:
    tasks = [task for task in mine if kind_of(task) == kind]
    return statistics.fmean(mine[task] for task in tasks), statistics.fmean(theirs[task] for task in tasks)


def _pruning_verdicts(rows: Rows) -> list[Verdict]:
    found = []
    own = entries(rows, "tcess", _HALF)
    if own:
        for kind in KINDS:
            of_kind = entries(rows, "tcess", _HALF, kind)
            if not of_kind:
                continue
            ratios = [entry["force_mae_ratio"] for entry in of_kind]
            told = (
                f"{statistics.fmean(ratios) - 1:+.2%} on average, {max(ratios) - 1:+.2%} at most; forces "
                f"change by {_mean_change(of_kind):.5f} eV/Å"
            )
            question = f"{kind} frames, half of the experts: force MAE at most 2 % worse"
            found.append(Verdict(question, told, statistics.fmean(ratios) <= _WORSE))
        changes = {name: _mean_change(entries(rows, name, _HALF)) for name in METHODS}
        for name in METHODS[1:]:
            question = f"half of the experts: TCESS changes forces less than {name}"
            told = f"{changes['tcess']:.5f} against {changes[name]:.5f} eV/Å"
            found.append(Verdict(question, told, changes["tcess"] < changes[name]))
        shares = {
            name: statistics.fmean(entry["flagged"][name]["bound"] for entry in own)
            for name in ("own", "others")
        }
        question = "systems of other tasks are worse than the bound, and those of the task are not"
        told = f"{shares['others']:.0%} of the others, {shares['own']:.0%} of its own"
        found.append(Verdict(question, told, shares["others"] > _HALF > shares["own"]))
    every = [entry for row in of_part(rows, "prune") for entry in row["entries"]]
    if every:
        broken = sum(entry["weight_change"] > entry["bound"] for entry in every)
        told = f"{broken} of {len(every)}"
        found.append(Verdict("the bound of the change of weights is never violated", told, broken == 0))
    return found


def _mean_change(own: Rows) -> float:
    return statistics.fmean(entry["measured_change_eV_A"] for entry in own)


def _retrieval_verdicts(rows: Rows) -> list[Verdict]:
    found = []
    retrieved = of_part(rows, "retrieve")
    for per in sorted({entry["per"] for row in retrieved for entry in row["top1"]}):
        shares = [_top1(row, per, True, False) for row in retrieved]
        others = [_top1(row, per, True, True) for row in retrieved]
        mean, other = statistics.fmean(shares), statistics.fmean(others)
        question = f"retrieval, a set per {per}, kind of labels given: top-1 at least {_TOP1:.0%}"
        found.append(Verdict(question, f"{mean:.1%}", mean >= _TOP1))
        question = f"retrieval, a set per {per}: better than the nearest composition"
        found.append(Verdict(question, f"{mean:.1%} against {other:.1%}", mean > other))
    if retrieved:
        shares = [row["bytes_read"] / row["bytes_of_all_experts"] for row in retrieved]
        told = f"{statistics.fmean(shares):.1%} of the bytes of all experts"
        found.append(Verdict("retrieval reads less than all experts", told, max(shares) < 1))
    return found


def _top1(row: Row, per: str, labels_given: bool, by_composition: bool) -> float:
    wanted = (per, labels_given, by_composition)
    return next(
        float(entry["share"])
        for entry in row["top1"]
        if (entry["per"], entry["labels_given"], entry["by_composition"]) == wanted
    )


def markdown(rows: Rows, found: Sequence[Verdict], figure: str) -> str:
    """Format the page.

    Args:
        rows: of all parts.
        found: verdicts.
        figure: file name of the figure.
    """
    lines = [
        "# Mixture of experts",
        "",
        "Written by `python -m studies.experts`, which says what the rows are. Frames that are judged are of",
        "slabs that were not learned, of elements that were; where a group has no such slabs,",
        "later frames of its relaxations. Forces of free atoms. Labels of `teacher` tasks are those of",
        "SevenNet-0, of `dft` tasks those of OC20: errors of the two kinds are not comparable.",
        "",
        "| to show | measured | |",
        "|---|---|---|",
        *(f"| {v.question} | {v.measured} | {'yes' if v.holds else 'no'} |" for v in found),
        "",
        f"![force errors of the tasks, and change of forces over the share of experts]({figure})",
    ]
    return "\n".join([*lines, *_training_lines(rows), *_pruning_lines(rows), *_retrieval_lines(rows)]) + "\n"


def _training_lines(rows: Rows) -> list[str]:
    parts = [part for part in TITLES if of_part(rows, part)]
    if not parts:
        return []
    tasks = list(
        dict.fromkeys(task for part in parts for row in of_part(rows, part) for task in row["errors"])
    )
    titles = " | ".join(TITLES[part] for part in parts)
    lines = ["", "## Training", "", "Force MAE in eV/Å (energy MAE in eV), means over seeds.", ""]
    lines += [f"| task | frames | zero forces | {titles} |", "|" + "---|" * (3 + len(parts))]
    for task in tasks:
        own = {p: [r["errors"][task] for r in of_part(rows, p) if task in r["errors"]] for p in parts}
        one = next(values[0] for values in own.values() if values)
        cells = [task, f"{one['frames']}", f"{one['zero_force_mae_eV_A']:.4f}"]
        cells += [_errors(values) for values in own.values()]
        lines.append(f"| {' | '.join(cells)} |")
    for part in parts:
        counts = sorted({row["parameters"] for row in of_part(rows, part)})
        lines += ["", f"{TITLES[part].capitalize()}: {' to '.join(f'{n:,}' for n in counts)} parameters."]
    return lines


def _errors(values: Rows) -> str:
    if not values:
        return "–"
    force, energy = ([value[key] for value in values] for key in ("force_mae_eV_A", "energy_mae_eV"))
    spread = f" ± {statistics.stdev(force):.4f}" if len(force) > 1 else ""
    return f"{statistics.fmean(force):.4f}{spread} ({statistics.fmean(energy):.3f})"


def _pruning_lines(rows: Rows) -> list[str]:
    pruned = of_part(rows, "prune")
    if not pruned:
        return []
    lines = ["", "## Pruning", "", "Means over tasks and seeds, on held-out frames of the task.", ""]
    lines += [
        "| frames | share of the experts | chosen by | force MAE, eV/Å | change of forces, eV/Å | "
        "of energies, eV | change of weights (bound) | file |",
        "|" + "---|" * 8,
    ]
    before = statistics.fmean(row["bytes_before"] for row in pruned)
    keeps = sorted({entry["keep"] for row in pruned for entry in row["entries"]}, reverse=True)
    for kind, keep in itertools.product(KINDS, keeps):
        for method in METHODS:
            own = entries(rows, method, keep, kind)
            if not own:
                continue
            mean = {
                key: statistics.fmean(entry[key] for entry in own)
                for key in (
                    "force_mae_eV_A",
                    "force_mae_ratio",
                    "measured_change_eV",
                    "weight_change_relative",
                    "bound_relative",
                )
            }
            size = statistics.fmean(entry["bytes"] for entry in own) / before if method == "tcess" else None
            cells = [
                kind,
                f"{keep:.0%}",
                method,
                f"{mean['force_mae_eV_A']:.4f} ({mean['force_mae_ratio'] - 1:+.2%})",
                f"{_mean_change(own):.5f}",
                f"{mean['measured_change_eV']:.4f}",
                f"{mean['weight_change_relative']:.1%} ({mean['bound_relative']:.1%})",
                "–" if size is None else f"{size:.1%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _retrieval_lines(rows: Rows) -> list[str]:
    retrieved = of_part(rows, "retrieve")
    if not retrieved:
        return []
    count = retrieved[0]["systems"]
    lines = ["", "## Retrieval", "", f"Share of {count} held-out compositions whose own task is nearest.", ""]
    lines += ["| a set per | kind of labels | by the gate | by nearest composition |", "|---|---|---|---|"]
    for per in sorted({entry["per"] for entry in retrieved[0]["top1"]}):
        for given in (True, False):
            shares = [
                statistics.fmean(_top1(row, per, given, by_composition) for row in retrieved)
                for by_composition in (False, True)
            ]
            cells = [per, "given" if given else "not given", *(f"{share:.1%}" for share in shares)]
            lines.append(f"| {' | '.join(cells)} |")
    mean = {
        key: statistics.fmean(row[key] for row in retrieved)
        for key in (
            *("bytes_read", "bytes_of_all_experts", "cache_hits", "composition_changes"),
            *("parameter_bytes_full", "parameter_bytes_peak", "parameter_bytes_merged"),
        )
    }
    calls = mean["cache_hits"] + mean["composition_changes"]
    lines += [
        "",
        f"Bytes read for one structure: {mean['bytes_read']:,.0f} of {mean['bytes_of_all_experts']:,.0f} "
        f"({mean['bytes_read'] / mean['bytes_of_all_experts']:.1%}). Weights in memory: "
        f"{mean['parameter_bytes_full']:,.0f} bytes for all experts, at most "
        f"{mean['parameter_bytes_peak']:,.0f} while a set is merged, {mean['parameter_bytes_merged']:,.0f} "
        f"after it. Merged networks found in a cache of four: {mean['cache_hits']:.0f} of {calls:.0f}.",
    ]
    return lines


def draw(rows: Rows, target: Path) -> None:
    """Draw force errors of the tasks, and the change of forces over the share of experts that stays."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    parts = [part for part in TITLES if of_part(rows, part)]
    tasks = list(
        dict.fromkeys(task for part in parts for row in of_part(rows, part) for task in row["errors"])
    )
    for number, part in enumerate(parts):
        points = [
            (tasks.index(task) + 0.25 * (number - 1), errors["force_mae_eV_A"])
            for row in of_part(rows, part)
            for task, errors in row["errors"].items()
        ]
        left.plot(*zip(*points, strict=True), "o", markersize=4, label=TITLES[part])
    left.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    left.set(ylabel="force MAE, eV/Å", title="errors of the tasks")
    keeps = sorted({entry["keep"] for row in of_part(rows, "prune") for entry in row["entries"]})
    for method in METHODS if keeps else ():
        own = [(keep, entries(rows, method, keep)) for keep in keeps]
        points = [(keep, _mean_change(found)) for keep, found in own if found]
        right.plot(*zip(*points, strict=True), "o-", label=method)
    right.set(xlabel="share of the experts that stays", title="change of forces, eV/Å")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(figure, target)

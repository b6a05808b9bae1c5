"""Tables and figure of the comparison of EquiformerV2 and EquiformerV3's switches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from equiformer2.training.figures import save_figure

LABELS = {
    "forces_mae": "force MAE (eV/Å)",
    "forces_cosine_similarity": "force cosine",
    "energy_mae": "energy MAE (eV)",
}
SOURCES = {
    "dft": "DFT frames (OC20), other systems than those trained on",
    "teacher": "Teacher labels (SevenNet-0, not DFT), other systems than those trained on",
}
#: Of the standard error of a difference: what counts as one.
CLEAR = 2.0

Summary = dict[str, dict[str, dict[str, Any]]]


def summary(results: Sequence[Mapping[str, Any]], settings: Sequence[str], metrics: Sequence[str]) -> Summary:
    """By data and setting: steps, parameters, compute; mean and standard deviation over seeds of each metric.

    Settings other than `v2` also have `difference`: mean minus that of V2, and its standard error.
    """
    found: Summary = {}
    for data in sorted({str(result["data"]) for result in results}):
        found[data] = {}
        for setting in settings:
            runs = [result for result in results if (result["data"], result["setting"]) == (data, setting)]
            if not runs:
                continue
            values = {name: np.array([run["metrics"][name] for run in runs]) for name in metrics}
            seconds = [run["cpu_seconds"] for run in runs if run["cpu_seconds"] is not None]
            found[data][setting] = {
                "seeds": len(runs),
                "steps": runs[0]["steps"],
                "parameters": runs[0]["parameters"],
                "macs_per_structure": runs[0]["macs_per_structure"],
                "cpu_seconds": float(np.mean(seconds)) if seconds else None,
                "metrics": {
                    name: {"mean": float(each.mean()), "std": _std(each)} for name, each in values.items()
                },
            }
            if setting != "v2" and "v2" in found[data]:
                found[data][setting]["difference"] = _differences(found[data][setting], found[data]["v2"])
    return found


def _std(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    differences: dict[str, dict[str, float | None]] = {}
    for name, mine in one["metrics"].items():
        theirs = other["metrics"][name]
        error = None
        if mine["std"] is not None and theirs["std"] is not None:
            error = float(np.hypot(mine["std"] / one["seeds"] ** 0.5, theirs["std"] / other["seeds"] ** 0.5))
        differences[name] = {"mean": mine["mean"] - theirs["mean"], "standard_error": error}
    return differences


def markdown(table: Summary, results: Sequence[Mapping[str, Any]], figure: str) -> str:
    """The page of results."""
    lines = [
        "# EquiformerV2 and EquiformerV3's switches at equal compute",
        "",
        "Written by `python -m studies.compare_v3`, which has the sizes of the network and the rules; the",
        "switches are explained in [the network](../model.md#equiformerv3s-switches). All settings were",
        "trained for the same number of multiply-accumulates, so a setting whose structures cost more had",
        "fewer steps. Mean ± standard deviation over seeds, weights averaged over steps, on systems that no",
        "training has seen. Such small and short runs say little about large and long ones.",
        "",
        f"![comparison]({figure})",
        "",
    ]
    for data, settings in table.items():
        example = next(result for result in results if result["data"] == data)
        baselines = example["baselines"]
        lines += [
            f"## {SOURCES[data]}",
            "",
            f"{example['structures']} structures of {example['systems']} systems. Zero forces have a force "
            f"MAE of {baselines['forces_mae']:.4f} eV/Å, the training mean an energy MAE of "
            f"{baselines['energy_mae']:.3f} eV.",
            "",
            "| setting | seeds | parameters | MMAC per structure | steps | CPU s | "
            f"{' | '.join(LABELS.values())} |",
            "|" + "---|" * (6 + len(LABELS)),
        ]
        for setting, row in settings.items():
            cells = [
                setting,
                row["seeds"],
                f"{row['parameters']:,}",
                f"{row['macs_per_structure'] / 1e6:.1f}",
            ]
            cells += [row["steps"], "–" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f}"]
            cells += [_number(row["metrics"][name]) for name in LABELS]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += [
            "",
            *(_verdict(name, settings, baselines) for name in settings if "difference" in settings[name]),
            "",
        ]
    return "\n".join(lines)


def _number(value: Mapping[str, float | None]) -> str:
    spread = "" if value["std"] is None else f" ± {value['std']:.4f}"
    return f"{value['mean']:.4f}{spread}"


def _verdict(setting: str, rows: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, float]) -> str:
    parts, row = [], rows[setting]
    for name, label in LABELS.items():
        mean, error = (row["difference"][name][key] for key in ("mean", "standard_error"))
        better = (mean > 0) == (name == "forces_cosine_similarity")
        if error is None:
            words = ["one seed"]
        elif abs(mean) > CLEAR * error:
            words = ["better" if better else "worse"]
        else:
            words = ["no clear difference"]
        weakest = max(rows[which]["metrics"][name]["mean"] for which in ("v2", setting))
        if name in baselines and weakest >= baselines[name]:
            words.append("not both beat the baseline")
        spread = "" if error is None else f" ± {error:.4f}"
        parts.append(f"{label} {mean:+.4f}{spread} ({', '.join(words)})")
    return f"- {setting} − v2, ± standard error: {'; '.join(parts)}."


def draw(
    results: Sequence[Mapping[str, Any]], settings: Sequence[str], metrics: Sequence[str], target: Path
) -> None:
    """Every seed as a point, means as bars, baselines as lines; a row per data set, a column per metric."""
    sources = sorted({str(result["data"]) for result in results})
    present = [name for name in settings if any(result["setting"] == name for result in results)]
    figure = Figure(figsize=(4 * len(metrics), 3.2 * len(sources)), layout="constrained")
    axes = figure.subplots(len(sources), len(metrics), squeeze=False)
    for row, data in zip(axes, sources, strict=True):
        for axis, metric in zip(row, metrics, strict=True):
            for place, setting in enumerate(present):
                chosen = [r for r in results if (r["data"], r["setting"]) == (data, setting)]
                values = [r["metrics"][metric] for r in chosen]
                if values:
                    axis.bar(place, np.mean(values), color="0.85")
                    axis.plot([place] * len(values), values, "o", color="C0", markersize=4)
            baseline = next(r["baselines"] for r in results if r["data"] == data).get(metric)
            if baseline is not None:
                name = "zero forces" if metric == "forces_mae" else "mean of the training energies"
                axis.axhline(baseline, color="C3", linestyle="--", linewidth=1, label=name)
                axis.legend(loc="lower right", fontsize="small")
            axis.set_xticks(range(len(present)), present, rotation=30, ha="right")
            axis.set(title=f"{data}: {LABELS[metric]}")
            axis.grid(axis="y", alpha=0.3)
    save_figure(figure, target)

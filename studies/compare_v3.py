"""EquiformerV2 against EquiformerV3's switches (docs/model.md) at equal compute, on DFT and teacher labels.

    python -m studies.compare_v3                       # V2 and V3, 3 seeds, both data sets
    python -m studies.compare_v3 --settings v2 v3 smooth_cutoff merged_layer_norm swiglu_s2 per_degree_radial

Every setting is trained from random weights for the same number of multiply-accumulates (a setting whose
structures cost more gets fewer steps), all else equal, and evaluated on systems that it has not seen. DFT and
teacher labels never meet in one number. One result file per run: a killed program continues where it was,
further settings and seeds add to what is there. The data are those of configs/oc20_small.yaml and
configs/oc20_small_teacher.yaml, which say how they are made.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from datasets_oc20 import OC20Lmdb
from equiformer2.errors import InputError
from equiformer2.files import write_json
from equiformer2.graph import radius_graph
from equiformer2.inference import Predictor
from equiformer2.model import ModelConfig
from equiformer2.pruning import count_macs
from equiformer2.script import origin, run_script
from equiformer2.training.configuration import parse
from equiformer2.training.evaluation import evaluate
from equiformer2.training.figures import save_figure
from equiformer2.training.run import train

#: configs/oc20_small.yaml with half of its layers and channels; the grid is exact for SwiGLU-S2.
MODEL = ModelConfig(
    num_layers=2,
    sphere_channels=16,
    attn_hidden_channels=16,
    num_heads=4,
    attn_alpha_channels=8,
    attn_value_channels=4,
    ffn_hidden_channels=32,
    lmax=2,
    mmax=2,
    grid_resolution=8,
    edge_channels=16,
    num_distance_basis=64,
    max_neighbors=12,
    max_radius=8.0,
    alpha_drop=0.0,
    drop_path_rate=0.0,
)
SETTINGS: dict[str, ModelConfig] = {
    "v2": MODEL,
    "v3": MODEL.with_v3(),
    "smooth_cutoff": dataclasses.replace(MODEL, smooth_cutoff=True),
    "merged_layer_norm": dataclasses.replace(MODEL, norm_type="rms_norm_sh"),
    "swiglu_s2": dataclasses.replace(MODEL, use_swiglu_s2_act=True),
    "per_degree_radial": dataclasses.replace(MODEL, use_m_share_rad=True),
}
DATA = {
    "dft": (Path("runs/data/small_train.lmdb"), Path("runs/data/small_unseen.lmdb")),
    "teacher": (Path("runs/data/teacher_train.lmdb"), Path("runs/data/teacher_unseen.lmdb")),
}
TASK = ["--task.energy_coefficient=20", "--task.force_coefficient=100", "--task.ema_decay=0.99"]
OPTIM = ["--optim.lr=1e-3", "--optim.weight_decay=1e-3", "--optim.warmup_epochs=0.2"]
BATCH_SIZE = 4
METRICS = ("forces_mae", "forces_cosine_similarity", "energy_mae")
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", default=["v2", "v3"], choices=list(SETTINGS))
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … (default: %(default)s)")
    parser.add_argument(
        "--v2-steps",
        type=int,
        default=600,
        help="steps of the V2 setting, whose compute all get (default: %(default)s)",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/v3_comparison"), help="runs and their results"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results/v3_comparison"),
        help="written as .json, .md and .png",
    )
    parser.add_argument(
        "--collect", action="store_true", help="train nothing: write the results that there are"
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.v2_steps < 1:
        raise InputError("--seeds and --v2-steps must be at least 1")
    torch.set_num_threads(1)
    if not arguments.collect:
        _run_all(arguments)
    found = [json.loads(path.read_text()) for path in sorted(arguments.runs.glob("*.result.json"))]
    if not found:
        raise InputError(f"{arguments.runs} holds no results: run without --collect first")
    _report(found, arguments.results)


def _run_all(arguments: argparse.Namespace) -> None:
    # Seeds outermost: whenever the program is stopped, all settings have as many of them.
    planned = [
        (data, setting, seed)
        for seed in range(arguments.seeds)
        for data in arguments.data
        for setting in arguments.settings
    ]
    means = {data: _means(DATA[data][0]) for data in arguments.data}
    for data, setting, seed in tqdm(planned, desc="runs", unit="run"):
        target = arguments.runs / f"{data}-{setting}-{seed}.result.json"
        if target.exists():
            known = json.loads(target.read_text())["v2_steps"]
            if known != arguments.v2_steps:
                raise InputError(f"{target} is of --v2-steps {known}: use that number or other --runs")
            continue
        _run(data, setting, seed, arguments.v2_steps, means[data], target)


def _means(path: Path) -> tuple[float, float]:
    """Atoms and edges per structure of a dataset."""
    dataset = OC20Lmdb(path, None)
    chosen = range(0, len(dataset), max(1, len(dataset) // 60))
    edges = 0
    for index in chosen:
        record = dataset[index]
        graph = radius_graph(
            record.pos,
            record.cell,
            record.pbc,
            torch.tensor([record.natoms]),
            max_radius=MODEL.max_radius,
            max_neighbors=MODEL.max_neighbors,
            strict=True,
        )
        edges += len(graph.distances)
    return float(sum(dataset.natoms) / len(dataset)), edges / len(chosen)


def _run(data: str, setting: str, seed: int, v2_steps: int, means: tuple[float, float], target: Path) -> None:
    config = SETTINGS[setting]
    atoms, edges = (round(mean) for mean in means)
    macs = {name: count_macs(each, atoms, edges) for name, each in (("v2", MODEL), (setting, config))}
    steps = round(v2_steps * macs["v2"].total / macs[setting].total)
    training, unseen = DATA[data]
    model = [
        f"--model.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in config.to_dict().items()
    ]
    length = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=0"]
    run = parse(
        [
            *(f"--name={target.name.removesuffix('.result.json')}", f"--runs_dir={target.parent}"),
            *(f"--seed={seed}", "--ckpt_path=auto", "--checkpoint_every_n_steps=50"),
            *(f"--data.train={training}", f"--data.val={unseen}", "--data.energy_kind=adsorption"),
            f"--data.batch_size={BATCH_SIZE}",
            *(*model, *TASK, *OPTIM, *length, "--trainer.accelerator=cpu"),
            "--trainer.enable_progress_bar=false",
        ]
    )
    resumed = (target.parent / str(run.run.name) / "checkpoints" / "last.ckpt").exists()
    start = time.process_time()
    folder = train(run)
    seconds = time.process_time() - start
    predictor = Predictor(folder / "checkpoints" / "last.pt")
    evaluation = evaluate(predictor, OC20Lmdb(unseen, None))
    result: dict[str, Any] = {
        "data": data,
        "setting": setting,
        "seed": seed,
        "v2_steps": v2_steps,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "macs_per_structure": macs[setting].total,
        "parameters": macs[setting].parameters,
        "cpu_seconds": None if resumed else round(seconds, 1),
        "metrics": {name: evaluation.metrics[name] for name in METRICS},
        "baselines": {
            "energy_mae": evaluation.baselines["mean_energy"]["energy_mae"],
            "forces_mae": evaluation.baselines["zero_force"]["forces_mae"],
        },
        "structures": evaluation.structures,
        "systems": evaluation.systems,
    }
    write_json(target, result)
    tqdm.write(f"{target.name}: {result['metrics']}")


def _report(results: list[dict[str, Any]], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    table = summary(results, list(SETTINGS), METRICS)
    write_json(stem.with_suffix(".json"), {**origin(), "runs": results, "summary": table})
    draw(results, list(SETTINGS), METRICS, stem.with_suffix(".png"))
    text = markdown(table, results, stem.with_suffix(".png").name)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


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


if __name__ == "__main__":
    run_script(main)

"""Training runs behind models/study_teacher.pt: variants, data, steps, size, EquiformerV3's switches, seeds.

    python -m studies.study_data                          # the LMDB files
    python -m studies.study_training --part variants      # four short runs on a quarter of the data
    python -m studies.study_training --part curve         # 1/8, 1/4, 1/2 and all data at equal steps
    python -m studies.study_training --part steps         # the smaller network for as few steps as a seed
    python -m studies.study_training --part v3            # the network with EquiformerV3's switches
    python -m studies.study_training --part seeds         # three seeds, the committee of studies.uncertainty
    python -m studies.study_training                      # the page of all that is there

All runs start from random weights and differ from configs/study.yaml in what SETTINGS says, and in 128
Gaussians of the distance instead of the reference's 600: a step then costs less. Every run is resumed where
it was stopped. Variants are judged on the validation bulks alone, the learning curve on the test bulks, too.
One thread computes a run (`OMP_NUM_THREADS=1`); several programs may work on different `--only` runs at the
same time.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from datasets_oc20 import OC20Lmdb
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.script import run_script
from equiformer2.training.configuration import parse
from equiformer2.training.figures import save_figure
from equiformer2.training.run import train
from studies.results import Results, Row, write_page
from studies.study_errors import Frames

CONFIG = Path("configs/study.yaml")
#: Options of `equiformer2 train` for the network of one million parameters: that of configs/oc20_small.yaml.
MILLION = (
    *("--model.sphere_channels=32", "--model.attn_hidden_channels=32", "--model.ffn_hidden_channels=64"),
    *("--model.attn_alpha_channels=8", "--model.attn_value_channels=8", "--model.edge_channels=32"),
)
#: Fewer Gaussians of the distance than the reference's 600, which configs/study.yaml has: a step costs less.
FEW_GAUSSIANS = "--model.num_distance_basis=128"
#: EquiformerV3's switches (docs/model.md).
V3 = (
    *("--model.smooth_cutoff=true", "--model.norm_type=rms_norm_sh"),
    *("--model.use_swiglu_s2_act=true", "--model.use_m_share_rad=true"),
)


@dataclass(frozen=True)
class Setting:
    """One training run.

    Attributes:
        part: part of the study that it belongs to.
        data: names of its training files in the folder of `studies.study_data`.
        steps: optimizer steps.
        options: options of `equiformer2 train` in which it differs from configs/study.yaml.
        judged: files that its errors are computed on.
    """

    part: str
    data: tuple[str, ...]
    steps: int
    options: tuple[str, ...] = ()
    judged: tuple[str, ...] = field(default=("val",))


SETTINGS: dict[str, Setting] = {
    "base": Setting("variants", ("train_1_4",), 2400),
    "learning rate x 2": Setting("variants", ("train_1_4",), 2400, ("--optim.lr=2e-3",)),
    "dropout": Setting(
        "variants", ("train_1_4",), 2400, ("--model.alpha_drop=0.1", "--model.drop_path_rate=0.05")
    ),
    "denoising": Setting("variants", ("train_1_4",), 2400, ("--task.dens.probability=0.5",)),
    "1/8": Setting("curve", ("train_1_8",), 6000, MILLION, ("val", "test")),
    "1/4": Setting("curve", ("train_1_4",), 6000, MILLION, ("val", "test")),
    "1/2": Setting("curve", ("train_1_2",), 6000, MILLION, ("val", "test")),
    "all": Setting("curve", ("train",), 6000, MILLION, ("val", "test")),
    "fewer steps": Setting("steps", ("train",), 2400, MILLION, ("val", "test")),
    "V3": Setting("v3", ("train_1_4",), 2400, V3),
    **{
        f"seed {seed}": Setting("seeds", ("train",), 2400, (f"--seed={seed}",), ("val", "test"))
        for seed in range(3)
    },
}
PARTS = {
    "variants": "Variants on a quarter of the data",
    "curve": "Learning curve: one million parameters, equal steps",
    "steps": "One million parameters, all of the data, fewer steps",
    "v3": "EquiformerV3's switches; the row `base` above is without them",
    "seeds": "The network of configs/study.yaml on all of the data, by random seed",
}
COLUMNS = {
    "force_ratio": "force MAE ÷ that of zero forces",
    "force_cosine": "cosine",
    "energy_ratio": "energy MAE ÷ that of the mean energy",
}

#: Of the learning curve, for its slope.
_FEWEST_POINTS = 3

#: What a network could have more of: the change, the rows before it and those after it.
LEVERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "data: half → all (1 M parameters, 6,000 steps)": (("1/2",), ("all",)),
    "steps: 2,400 → 6,000 (1 M parameters, all data)": (("fewer steps",), ("all",)),
    "parameters: 1 → 2.3 M (2,400 steps, all data)": (
        ("fewer steps",),
        tuple(f"seed {seed}" for seed in range(3)),
    ),
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(PARTS), help="runs to train (default: none, write the page)")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="these runs of the part")
    parser.add_argument("--data", type=Path, default=Path("runs/data/study"), help="folder of the LMDB files")
    parser.add_argument("--runs", type=Path, default=Path("runs/study_training"), help="folder of the runs")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results/study_training"),
        help="page, numbers and figure, as .md, .json and .png",
    )
    arguments = parser.parse_args(words)
    results = Results(arguments.runs, about, arguments.results)
    for name, setting in SETTINGS.items():
        wanted = arguments.only is None or name in arguments.only
        if setting.part == arguments.part and wanted and results.get(run_name(name)) is None:
            run(name, arguments.data, arguments.runs, results)
    report(results, arguments.results)


def run_name(name: str) -> str:
    """Name of the folder and the result of a setting."""
    return f"{SETTINGS[name].part}-{name.replace('/', '_').replace(' ', '_')}"


def about(run: str) -> dict[str, Any] | None:
    """Settings of a run by its name."""
    setting = next((each for name, each in SETTINGS.items() if run_name(name) == run), None)
    if setting is None:
        return None
    return {"steps": setting.steps, "options": list(setting.options), "data": list(setting.data)}


def run(name: str, data: Path, runs: Path, results: Results) -> None:
    """Train one setting to its end, going on where it was, and keep its errors.

    Args:
        name: one of `SETTINGS`.
        data: folder of the LMDB files.
        runs: folder of the runs.
        results: takes the errors.

    Raises:
        InputError: a file is missing.
    """
    setting = SETTINGS[name]
    files = {part: data / f"{part}.lmdb" for part in (*setting.data, *setting.judged, "val")}
    missing = [path for path in files.values() if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]} is missing: run `python -m studies.study_data` first")
    every = setting.steps // 4
    folder = train(
        parse(
            [
                *("--config", str(CONFIG), "--ckpt_path=auto"),
                *(f"--name={run_name(name)}", f"--runs_dir={runs}"),
                *("--data.train", json.dumps([str(files[part]) for part in setting.data])),
                *(f"--data.val={files['val']}", f"--trainer.max_steps={setting.steps}"),
                *("--trainer.max_epochs=-1", f"--trainer.val_check_interval={every}"),
                *("--trainer.check_val_every_n_epoch=null", FEW_GAUSSIANS, *setting.options),
            ]
        )
    )
    predictor = Predictor(folder / "checkpoints" / "last.pt")
    errors = {}
    for part in setting.judged:
        frames = Frames.compute(predictor, OC20Lmdb(files[part]), 8, part)
        errors[part] = frames.summary(torch.ones(len(frames.sid), dtype=torch.bool).numpy())
    count = sum(len(OC20Lmdb(files[part])) for part in setting.data)
    results.keep(run_name(name), {"name": name, "part": setting.part, "frames": count, "errors": errors})


def report(results: Results, page: Path) -> None:
    """Write page, numbers and figure of all results.

    Args:
        results: of the runs.
        page: path without ending.

    Raises:
        InputError: there is no result yet.
    """
    order = list(SETTINGS)
    rows = sorted(results.all(), key=lambda row: order.index(row["name"]))
    figure = page.with_suffix(".png")
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, figure)
    found, compared = doubling(rows), levers(rows)
    write_page(page, rows, markdown(rows, found, compared, figure.name), doubling=found, levers=compared)


def doubling(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Fit a power law of the number of training frames to the learning curve.

    Args:
        rows: of all runs.

    Returns:
        By judged part and error, its factor for twice the frames; of the cosine, that of 1 - cosine. Nothing
        before three points are there.
    """
    curve = [row for row in rows if row["part"] == "curve"]
    if len(curve) < _FEWEST_POINTS:
        return {}
    frames = np.log2([row["frames"] for row in curve])
    found: dict[str, dict[str, float]] = {}
    for judged in curve[0]["errors"]:
        for key in COLUMNS:
            values = np.array([row["errors"][judged][key] for row in curve])
            errors = 1 - values if key == "force_cosine" else values
            found.setdefault(judged, {})[key] = float(np.exp(np.polyfit(frames, np.log(errors), 1)[0]))
    return found


def levers(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Compare on the test bulks what more data, more steps and more parameters bring.

    Args:
        rows: of all runs.

    Returns:
        By change (`LEVERS`) and error, its value before and after; of several seeds the mean of those that
        are there. Only changes whose rows are there.
    """
    errors = {row["name"]: row["errors"]["test"] for row in rows if "test" in row["errors"]}
    found = {}
    for change, sides in LEVERS.items():
        there = [[errors[name] for name in names if name in errors] for names in sides]
        if all(there):
            found[change] = {
                key: [float(np.mean([each[key] for each in side])) for side in there] for key in COLUMNS
            }
    return found


def markdown(
    rows: Sequence[Row],
    twice: Mapping[str, Mapping[str, float]],
    compared: Mapping[str, Mapping[str, Sequence[float]]],
    figure: str,
) -> str:
    """Format the page of results.

    Args:
        rows: of all runs.
        twice: see `doubling`.
        compared: see `levers`.
        figure: name of the file.
    """
    lines = [
        "# Training runs of the study network",
        "",
        "Written by `python -m studies.study_training`, which says how the runs differ. Labels are those of",
        "SevenNet-0, not DFT. Averaged weights; errors of free atoms and adsorption energies as",
        "`studies.study_errors` defines them, on bulks that no training file holds.",
        "",
        f"![errors over the number of training frames]({figure})",
    ]
    for part, title in PARTS.items():
        chosen = [row for row in rows if row["part"] == part]
        if not chosen:
            continue
        lines += [
            "",
            f"## {title}",
            "",
            f"| run | training frames | steps | judged on | {' | '.join(COLUMNS.values())} |",
            "|" + "---|" * (4 + len(COLUMNS)),
        ]
        for row in chosen:
            for judged, errors in row["errors"].items():
                cells = [row["name"], f"{row['frames']:,}", f"{row['about']['steps']:,}", judged]
                cells += [f"{errors[key]:.3f}" for key in COLUMNS]
                lines.append(f"| {' | '.join(cells)} |")
        if part == "curve" and twice:
            lines += ["", "Twice the frames multiply, by a power law through the points:", ""]
            lines += ["| judged on | force MAE | 1 - cosine | energy MAE |", "|---|---|---|---|"]
            for judged, factors in twice.items():
                lines.append(f"| {judged} | {' | '.join(f'{factor:.3f}' for factor in factors.values())} |")
    if compared:
        lines += ["", "## Data, steps or size", ""]
        lines += ["Errors on the test bulks before and after one change, the rest being equal:", ""]
        lines += [f"| change | {' | '.join(COLUMNS.values())} |", "|" + "---|" * (1 + len(COLUMNS))]
        for change, errors in compared.items():
            cells = [f"{before:.3f} → {after:.3f}" for before, after in errors.values()]
            lines.append(f"| {change} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], target: Path) -> None:
    """Draw the learning curve: each error over the number of training frames, a line per judged part."""
    curve = [row for row in rows if row["part"] == "curve"]
    figure = Figure(figsize=(4 * len(COLUMNS), 3.2), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, len(COLUMNS)), COLUMNS.items(), strict=True):
        for judged in sorted({name for row in curve for name in row["errors"]}):
            points = sorted((row["frames"], row["errors"][judged][key]) for row in curve)
            axis.plot(*zip(*points, strict=True), "o-", label=judged)
        axis.set(xscale="log", xlabel="training frames", title=title)
        axis.grid(alpha=0.3)
        if curve:
            frames = sorted({row["frames"] for row in curve})
            axis.set_xticks(frames, [f"{number:,}" for number in frames])
            axis.minorticks_off()
            axis.legend()
    save_figure(figure, target)


if __name__ == "__main__":
    run_script(main)

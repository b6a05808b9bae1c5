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
from pathlib import Path
from typing import Any

import torch
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
from equiformer2.training.run import train
from studies.v3_report import draw, markdown, summary

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


if __name__ == "__main__":
    run_script(main)

"""Adapters against full fine-tuning: error, forgetting, size, memory and time on other data.

    python -m studies.adapters                        # all runs that are not there yet, then the page
    python -m studies.adapters --parts dft --hours 2.5
    python -m studies.adapters --collect              # only write the page of the runs that there are

Target data, of which 200 frames are learned and 200 of other systems judged: `dft` (the bundled DFT
relaxations), `elements` (bulks with Se or Te, which the network has never seen) and `adsorbates` (as a
check). Every run is 300 optimizer steps from models/study_teacher.pt in a process of its own, whose peak
memory is its own, and one result file; a stopped program goes on. Averaged weights are judged. Learning rates
are those of `equiformer2 finetune`, the same for all adapters.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from tqdm import tqdm

from datasets_oc20 import LmdbWriter, OC20Lmdb
from datasets_oc20.frame_selection import hold_out_systems, spread_frames
from datasets_oc20.preprocess import preprocess
from equiformer2.checkpoint import load_checkpoint
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import write_json
from equiformer2.inference import Predictor
from equiformer2.script import run_script
from equiformer2.shipped import find_checkpoint
from equiformer2.symmetry import check_symmetries
from equiformer2.training.configuration import parse
from equiformer2.training.evaluation import predicted_batches
from equiformer2.training.run import train
from studies.results import Results, Row, write_page

DATA = Path("data")
SOURCE = "teacher_large/test"
PARTS = {
    "dft": ("DFT frames of the bundled relaxations", "oc20_trajs"),
    "elements": ("bulks with Se or Te", "teacher_large/shift_elements"),
    "adsorbates": ("adsorbates with two nitrogen atoms", "teacher_large/shift_adsorbates"),
}
_FULL = ("--optim.lr=5e-4",)
_LAST = "[energy_block.so3_linear_2.weight, force_block.proj.weight]"
_RANK = ("--adapter.rank=4",)


@dataclass(frozen=True)
class Setting:
    """One way to learn the target data.

    Attributes:
        title: words for the page.
        options: of the training.
        seeds: number of runs.
        parts: target data that it is run on.
        starts: whether it starts from the network.
    """

    title: str
    options: tuple[str, ...]
    seeds: int = 3
    parts: tuple[str, ...] = ("dft", "elements")
    starts: bool = True

    @property
    def adapts(self) -> bool:
        """Tell whether an adapter is trained."""
        return any(option.startswith("--adapter.rank") for option in self.options)


def _adapter(title: str, *options: str, **more: Any) -> Setting:
    return Setting(title, ("--optim.lr=2e-3", *options), **more)


_ALL = ("dft", "elements", "adsorbates")
SETTINGS = {
    "full": Setting("full fine-tuning", _FULL, parts=_ALL),
    "dense": _adapter("dense adapter", *_RANK, "--adapter.keep=1"),
    "removed_40": _adapter("adapter, 40 % removed", *_RANK, "--adapter.keep=0.6"),
    "removed_80": _adapter("adapter, 80 % removed", *_RANK, "--adapter.keep=0.2", parts=_ALL),
    "large_sparse": _adapter(
        "Large-Sparse, rank times 4 (as many entries as dense)",
        *_RANK,
        "--adapter.keep=1",
        "--adapter.large_sparse=4",
    ),
    "magnitude": _adapter(
        "80 % removed by magnitude",
        *_RANK,
        *("--adapter.keep=0.2", "--adapter.method=magnitude"),
        parts=("elements",),
    ),
    "random": _adapter(
        "80 % removed at random",
        *_RANK,
        *("--adapter.keep=0.2", "--adapter.method=random"),
        parts=("elements",),
    ),
    "grasp": _adapter(
        "80 % removed by GraSP",
        *_RANK,
        *("--adapter.keep=0.2", "--adapter.method=grasp"),
        parts=("elements",),
    ),
    "last_layer": _adapter(
        "last layers alone", "--adapter.rank=1", "--adapter.keep=1", f"--adapter.weights={_LAST}", seeds=1
    ),
    "scratch": Setting("from random weights", ("--optim.lr=1e-3",), seeds=1, starts=False),
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="target data")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--checkpoint", default="study_teacher", help="network (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--frames", type=int, default=200, help="frames to learn, and to judge by (default: %(default)s)"
    )
    parser.add_argument("--hours", type=float, help="begin no run after this time (default: no limit)")
    parser.add_argument("--runs", type=Path, default=Path("runs/adapters"), help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/adapters"), help="page, without ending"
    )
    parser.add_argument("--collect", action="store_true", help="train nothing: write the results there are")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # name of the one run of a process
    arguments = parser.parse_args(words)
    if arguments.steps < 1 or arguments.frames < 2:
        raise InputError("--steps must be at least 1 and --frames at least 2")
    about = {name: getattr(arguments, name) for name in ("steps", "frames")}
    about["checkpoint_sha256"] = sha256(find_checkpoint(arguments.checkpoint))
    results = Results(arguments.runs, lambda _: about, arguments.results)
    if arguments.one is not None:
        run = arguments.one.split(":")
        results.keep("-".join(run), run_one(arguments, *run))
        return
    if not arguments.collect:
        run_all(arguments, results)
    report(results, arguments.results)


def planned(parts: Sequence[str], settings: Sequence[str]) -> list[tuple[str, str, int]]:
    """List the runs as (part, setting, seed); seeds outermost, so that all settings have as many of them."""
    most = max(setting.seeds for setting in SETTINGS.values())
    return [
        (part, name, seed)
        for seed in range(most)
        for part in parts
        for name in settings
        if part in SETTINGS[name].parts and seed < _seeds(name, part)
    ]


def _seeds(name: str, part: str) -> int:
    return 1 if part == "adsorbates" else SETTINGS[name].seeds


def run_all(arguments: argparse.Namespace, results: Results) -> None:
    """Run everything whose result is not there yet, one process after another."""
    begin = time.monotonic()
    data = data_folder(arguments)
    for part in arguments.parts:
        prepare(data, part, arguments.frames)
    prepare_source(data, arguments.frames)
    for part, name, seed in tqdm(planned(arguments.parts, arguments.settings), desc="runs", unit="run"):
        if results.get(f"{part}-{name}-{seed}") is not None:
            continue
        if arguments.hours is not None and time.monotonic() - begin > 3600 * arguments.hours:
            print(f"--hours {arguments.hours:g} are over: the same command goes on", file=sys.stderr)
            break
        command = [sys.executable, "-m", "studies.adapters", "--one", f"{part}:{name}:{seed}"]
        command += ["--checkpoint", arguments.checkpoint, "--steps", str(arguments.steps)]
        command += ["--runs", str(arguments.runs), "--frames", str(arguments.frames)]
        command += ["--results", str(arguments.results)]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise InputError(f"the run {part}-{name}-{seed} ended with status {done.returncode}")


def data_folder(arguments: argparse.Namespace) -> Path:
    """Folder of the frames; each number of frames has its own."""
    return Path(arguments.runs) / f"data_{arguments.frames}"


def prepare(folder: Path, part: str, frames: int) -> None:
    """Write the frames of a part to learn and to judge by, of different systems, unless they are there."""
    target = folder / f"{part}.json"
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"{part}.whole.lmdb"
    whole.unlink(missing_ok=True)
    preprocess(DATA / PARTS[part][1], whole)
    dataset = OC20Lmdb(whole)
    systems = [str(dataset[row].sid) for row in range(len(dataset))]
    names = sorted(set(systems))
    training, held = hold_out_systems(names, max(1, len(names) // 4), seed=0)
    counts = {}
    for kind, chosen in (("train", set(training)), ("test", set(held))):
        rows = np.array([row for row, name in enumerate(systems) if name in chosen])
        counts[kind] = _write(dataset, rows[spread_frames(len(rows), frames)], folder / f"{part}.{kind}.lmdb")
    del dataset
    whole.unlink()
    write_json(target, {"systems": {"train": training, "test": held}, "frames": counts})


def prepare_source(folder: Path, frames: int) -> None:
    """Write frames of the network's own test data, on which forgetting is measured."""
    target = folder / "source.lmdb"
    if target.exists():
        return
    whole = folder / "source.whole.lmdb"
    whole.unlink(missing_ok=True)
    preprocess(DATA / SOURCE, whole)
    dataset = OC20Lmdb(whole)
    _write(dataset, spread_frames(len(dataset), frames), target)
    del dataset
    whole.unlink()


def _write(dataset: OC20Lmdb, rows: np.ndarray, path: Path) -> int:
    path.unlink(missing_ok=True)
    with LmdbWriter(path, dataset.energy_kind) as writer:
        for row in rows.tolist():
            writer.write(dataset[row])
    return len(rows)


class StepTimes(Callback):
    """Processor time and peak memory of the optimizer steps of a run, without its start."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.before = self.peak = 0
        self._begin = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = peak_bytes()

    def on_train_batch_start(self, *_: Any) -> None:
        self._begin = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._begin)
        self.peak = peak_bytes()


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss starts at the parent's peak; VmHWM is this program's own.
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_one(arguments: argparse.Namespace, part: str, name: str, seed: str) -> Row:
    """Train one setting with one seed, and judge it."""
    torch.set_num_threads(1)
    setting, data = SETTINGS[name], data_folder(arguments)
    run_name, times = f"{part}-{name}-{seed}", StepTimes()
    base = load_checkpoint(arguments.checkpoint)
    own = {key: value for key, value in base.config.to_dict().items() if value is not None}
    words_of = {key: value if isinstance(value, str) else json.dumps(value) for key, value in own.items()}
    model = [f"--model.{key}={text}" for key, text in words_of.items()]
    words = [*model, f"--name={run_name}", f"--runs_dir={arguments.runs}", f"--seed={seed}"]
    words += ["--ckpt_path=auto", "--checkpoint_every_n_steps=50", "--trainer.enable_progress_bar=false"]
    words += [f"--data.train={data / f'{part}.train.lmdb'}", f"--data.val={data / f'{part}.test.lmdb'}"]
    words += [
        "--data.batch_size=4",
        "--trainer.limit_val_batches=0",
        f"--trainer.max_steps={arguments.steps}",
    ]
    words += ["--trainer.max_epochs=-1", "--trainer.accelerator=cpu", "--task.ema_decay=0.99"]
    words += ["--task.energy_coefficient=20", "--task.force_coefficient=100", "--optim.warmup_epochs=0.3"]
    words += setting.options
    if setting.starts:
        words += [f"--init_from={arguments.checkpoint}", "--refit_normalizers=true"]
    config = parse(words)
    resumed = (arguments.runs / run_name / "checkpoints" / "last.ckpt").exists()
    folder = train(replace(config, trainer=config.trainer | {"callbacks": [times]})) / "checkpoints"
    file = folder / ("last_adapter.pt" if setting.adapts else "last.pt")
    predictor = Predictor(base, adapter=file) if setting.adapts else Predictor(file)
    adapter = predictor.adapter
    count = sum(tensor.numel() for tensor in predictor.checkpoint.model.state_dict().values())
    dense = Predictor(base)
    frames = OC20Lmdb(data / f"{part}.test.lmdb")
    small = [frames[row] for row in np.argsort([int(frames[row].natoms) for row in range(len(frames))])[:2]]
    turned, turned_before = (
        check_symmetries(each.predict, small, symmetries=("rotation",), trials=1).errors["rotation"].largest
        for each in (predictor, dense)
    )
    return {
        **{"part": part, "setting": name, "seed": int(seed)},
        "errors": {
            where: errors(predictor, dense, OC20Lmdb(data / f"{file_name}.lmdb"))
            for where, file_name in (("target", f"{part}.test"), ("source", "source"))
        },
        "trainable_parameters": count if adapter is None else adapter.trainable_parameters,
        "bytes": file.stat().st_size,
        # A continued run has measured a part of its steps.
        "step_seconds": None if resumed else float(np.median(times.seconds)),
        "peak_bytes": None if resumed else times.peak,
        "peak_bytes_before_training": None if resumed else times.before,
        "rotation_error": turned,
        "rotation_error_before": turned_before,
    }


def errors(
    predictor: Predictor, dense: Predictor, dataset: OC20Lmdb, batch_size: int = 8
) -> dict[str, float]:
    """Mean absolute errors on free atoms against the labels, and differences from the dense network.

    Args:
        predictor: the network to judge.
        dense: the network before.
        dataset: frames with energies and forces.
        batch_size: frames per batch.
    """
    sums: dict[str, list[np.ndarray]] = {}
    answers = [
        list(predicted_batches(each.predict_batches, dataset, batch_size, None, 0))
        for each in (predictor, dense)
    ]
    for (batch, mine), (_, before) in zip(*answers, strict=True):
        free = ~batch.fixed.bool()
        for what, target in (("labels", batch), ("dense", before)):
            energy = (mine["energy"] - target["energy"].double()).abs()
            force = (mine["forces"][free] - target["forces"][free]).abs()
            sums.setdefault(f"energy_to_{what}_eV", []).append(energy.numpy())
            sums.setdefault(f"force_to_{what}_eV_A", []).append(force.double().flatten().numpy())
        sums.setdefault("dense_force_to_labels_eV_A", []).append(
            (before["forces"][free] - batch.forces[free]).abs().double().flatten().numpy()
        )
    return {name: float(np.concatenate(parts).mean()) for name, parts in sums.items()}


def report(results: Results, page: Path) -> None:
    """Write page and numbers of all finished runs.

    Raises:
        InputError: there is none.
    """
    order = {name: number for number, name in enumerate(SETTINGS)}
    rows = results.all()
    rows.sort(key=lambda row: (list(PARTS).index(row["part"]), order[row["setting"]], row["seed"]))
    write_page(page, rows, markdown(rows))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the page."""
    lines = [
        "# Adapters",
        "",
        "Written by `python -m studies.adapters`, which says what the runs are. Mean absolute errors of",
        f"forces on free atoms in eV/Å on at most {rows[0]['about']['frames']} frames, with the standard",
        "deviation over seeds. *To before* is the change of the forces there. *Forgetting* is the",
        "force error on the network's own test data after the training, with its change in per cent;",
        "*moved* is how far the forces there are from those of the network before. Memory is the peak",
        "of the process, of which *before* was there before the first step; times are seconds of one",
        "core. *Rotation* is the largest relative change of energies and forces under rotations (of the",
        "network before). Labels of all parts but the first are those of SevenNet-0.",
    ]
    for part, (title, _) in PARTS.items():
        chosen = [row for row in rows if row["part"] == part]
        if not chosen:
            continue
        before = chosen[0]["errors"]["target"]["dense_force_to_labels_eV_A"]
        lines += [
            "",
            f"## {title}",
            "",
            f"The network before: {before:.4f} eV/Å.",
            "",
            "| setting | seeds | error | to before | energy (eV) | forgetting | moved | trained | file | "
            "memory (before) | step | rotation |",
            "|" + "---|" * 12,
        ]
        for name, setting in SETTINGS.items():
            own = [row for row in chosen if row["setting"] == name]
            if own:
                lines.append(f"| {setting.title} | {len(own)} | {' | '.join(_cells(own))} |")
    return "\n".join(lines) + "\n"


def _cells(own: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(where: str, key: str) -> str:
        values = [row["errors"][where][key] for row in own]
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        return f"{np.mean(values):.4f}{spread}"

    def median(key: str) -> float | None:
        values = [row[key] for row in own if row[key] is not None]
        return float(np.median(values)) if values else None

    source = [row["errors"]["source"] for row in own]
    change = np.mean([e["force_to_labels_eV_A"] / e["dense_force_to_labels_eV_A"] - 1 for e in source])
    peak, before, step = (median(key) for key in ("peak_bytes", "peak_bytes_before_training", "step_seconds"))
    return [
        mean("target", "force_to_labels_eV_A"),
        mean("target", "force_to_dense_eV_A"),
        mean("target", "energy_to_labels_eV"),
        f"{mean('source', 'force_to_labels_eV_A')} ({change:+.1%})",
        mean("source", "force_to_dense_eV_A"),
        f"{own[0]['trainable_parameters']:,}",
        f"{own[0]['bytes'] / 1e6:.2f} MB",
        "–" if peak is None or before is None else f"{peak / 1e6:.0f} ({before / 1e6:.0f}) MB",
        "–" if step is None else f"{step:.2f} s",
        " ".join(
            text.format(max(row[key] for row in own))
            for key, text in (("rotation_error", "{:.1e}"), ("rotation_error_before", "({:.1e})"))
        ),
    ]


if __name__ == "__main__":
    run_script(main)

"""Validation errors over the course of a run, and a checkpoint's errors system by system."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch_geometric.data import Batch

from datasets_oc20 import OC20Lmdb
from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.training.evaluation import check_targets, training_mean_energy
from equiformer2.training.figures import save_figure

_BATCH_SIZE = 8
_VALIDATION_LINE = re.compile(r"step (\d+)  (\d+) s  .*val energy MAE")


@dataclass(frozen=True)
class Validation:
    """One validation of a run: seconds of training before it, optimizer step, metrics."""

    seconds: float
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class SystemErrors:
    """Errors on the frames of one system, beside trivial answers.

    Attributes:
        frames: how many.
        energy_mae, mean_energy_mae: of the model, and of one mean energy for all systems: of the training
            data where the checkpoint knows it, else of this dataset; with the linear references of a
            total-energy model; eV.
        energy_spread: mean absolute deviation of the energy error from its median over the frames, eV: what
            is left when only differences within the system count; `own_spread`: of the energies. Both are
            nothing to judge by where there is one frame.
        forces_mae, zero_force_mae: of the model and of zero forces on free atoms, eV/Å.
        force_cosine: mean cosine of predicted and true force on free atoms.
    """

    frames: int
    energy_mae: float
    mean_energy_mae: float
    energy_spread: float
    own_spread: float
    forces_mae: float
    zero_force_mae: float
    force_cosine: float

    @classmethod
    def from_frames(cls, energy: np.ndarray, force: np.ndarray, mean: float) -> "SystemErrors":
        """Compute the errors of one system.

        Args:
            energy: `[n, 3]` eV: target, prediction and linear reference of every frame.
            force: `[2, m, 3]` eV/Å: target and prediction of all free atoms.
            mean: mean energy, less references, that the trivial answer takes, eV.
        """
        target, predicted, references = energy.T
        true, found = force
        error = predicted - target
        norms = np.linalg.norm(true, axis=1) * np.linalg.norm(found, axis=1)
        cosine = (true * found).sum(1) / np.maximum(norms, 1e-12)
        return cls(
            frames=len(energy),
            energy_mae=float(np.abs(error).mean()),
            mean_energy_mae=float(np.abs(target - references - mean).mean()),
            energy_spread=float(np.abs(error - np.median(error)).mean()),
            own_spread=float(np.abs(target - np.median(target)).mean()),
            forces_mae=float(np.abs(true - found).mean()),
            zero_force_mae=float(np.abs(true).mean()),
            force_cosine=float(cosine.mean()),
        )


def read_validations(run: AnyPath) -> list[Validation]:
    """All validations of a run folder, in order.

    Raises:
        InputError: the folder is no run, or it never validated.
    """
    run = Path(run)
    for name in ("metrics.csv", "log.txt"):
        if not (run / name).is_file():
            raise InputError(f"{run} is no run folder of `equiformer2 train`: it has no {name}")
    seconds = {
        int(step): float(time) for step, time in _VALIDATION_LINE.findall((run / "log.txt").read_text())
    }
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/energy_mae")]
    found = []
    for row in rows:
        # Lightning counts steps in the CSV from 0, the log counts finished steps.
        step = int(row["step"]) + 1
        metrics = {
            key.removeprefix("val/"): float(value) for key, value in row.items() if key.startswith("val/")
        }
        if step in seconds:
            found.append(Validation(seconds[step], step, metrics))
    if not found:
        raise InputError(f"{run} holds no validation with a time in its log")
    return found


def errors_by_system(predictor: Predictor, dataset: OC20Lmdb) -> dict[str, SystemErrors]:
    """Errors of a checkpoint on every system of a dataset of its kind of energy.

    Raises:
        InputError: the model predicts no forces, or the records have no energies or forces.
    """
    if not predictor.has_forces:
        raise InputError(
            "the model predicts no forces: errors by system are of both, use `equiformer2 evaluate`"
        )
    check_targets(dataset[0], True, dataset.path)
    energies: dict[str, list[tuple[float, float, float]]] = {}
    forces: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(dataset), _BATCH_SIZE):
        records = [dataset[i] for i in range(start, min(start + _BATCH_SIZE, len(dataset)))]
        batch = Batch.from_data_list(records)
        out = predictor.predict(batch)
        references = predictor.checkpoint.normalizers.reference_energy(batch, batch.num_graphs)
        for i, record in enumerate(records):
            free = ~record.fixed.bool()
            predicted = out["forces"][batch.ptr[i] : batch.ptr[i + 1]][free].numpy()
            sid = str(record.sid)
            energies.setdefault(sid, []).append(
                (float(record.energy), float(out["energy"][i]), float(references[i]))
            )
            forces.setdefault(sid, []).append(np.stack([record.forces[free].numpy(), predicted]))
    mean = training_mean_energy(predictor)
    if mean is None:
        mean = float(np.mean([target - part for found in energies.values() for target, _, part in found]))
    return {
        sid: SystemErrors.from_frames(np.array(energies[sid]), np.concatenate(forces[sid], axis=1), mean)
        for sid in energies
    }


def draw_learning_curve(runs: dict[str, list[Validation]], zero_force: float | None, target: AnyPath) -> None:
    """Energy MAE, force MAE and force cosine of the validations against minutes of training.

    Args:
        runs: validations by label, each from its own start.
        zero_force: force MAE of zero forces on the last run's validation data, eV/Å.
        target: PNG file.
    """
    target = Path(target)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = (
        ("energy_mae", "energy MAE (eV)"),
        ("forces_mae", "force MAE (eV/Å)"),
        ("forces_cosine_similarity", "force cosine"),
    )
    for axis, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, validations in runs.items():
            minutes = [v.seconds / 60 for v in validations]
            axis.plot(minutes, [v.metrics[key] for v in validations], "o-", markersize=4, label=name)
        if key == "forces_mae" and zero_force is not None:
            axis.axhline(zero_force, color="0.5", linestyle="--", label="zero force (last run's data)")
        axis.set(xlabel="minutes of training", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    save_figure(figure, target)


def markdown(
    runs: dict[str, list[Validation]], systems: dict[str, dict[str, SystemErrors]], figure: str
) -> str:
    """Tables of the validations of every run and of the errors by system on every dataset."""

    def table(*columns: str) -> list[str]:
        return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]

    lines = [f"![learning curve]({figure})", ""]
    for name, validations in runs.items():
        lines += [f"Validation in `{name}`:", ""]
        lines += table("minutes", "step", "energy MAE (eV)", "force MAE (eV/Å)", "force cosine")
        for v in validations:
            energy, force = v.metrics["energy_mae"], v.metrics["forces_mae"]
            cosine = v.metrics["forces_cosine_similarity"]
            lines.append(f"| {v.seconds / 60:.1f} | {v.step} | {energy:.3f} | {force:.4f} | {cosine:.3f} |")
        lines.append("")
    for data, found in systems.items():
        lines += [
            f"Errors by system on `{data}`; in brackets what trivial answers reach: one mean energy for all "
            "(of the training data, where the checkpoint knows it), the system's own median, zero force.",
            "",
        ]
        lines += table(
            "system",
            "frames",
            "energy MAE (eV)",
            "energy about its median (eV)",
            "force MAE (eV/Å)",
            "force cosine",
        )
        for sid, s in found.items():
            about = f"{s.energy_spread:.3f} ({s.own_spread:.3f})" if s.frames > 1 else "one frame"
            lines.append(
                f"| {sid} | {s.frames} | {s.energy_mae:.3f} ({s.mean_energy_mae:.3f}) | {about} "
                f"| {s.forces_mae:.4f} ({s.zero_force_mae:.4f}) | {s.force_cosine:.3f} |"
            )
        lines.append("")
    return "\n".join(lines)

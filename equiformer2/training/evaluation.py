"""Evaluate a checkpoint on datasets: OC20's metrics beside trivial baselines."""

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20 import OC20Lmdb
from datasets_oc20.datamodule import collate
from datasets_oc20.npz_file import read_npz
from datasets_oc20.own_data import opening
from datasets_oc20.sampler import BalancedBatchSampler
from datasets_oc20.targets import check_energies_match_kind, sample_targets
from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import write_bytes
from equiformer2.inference import Predictor
from equiformer2.inference.committee import Committee
from equiformer2.training.breakdown import Breakdown, Rows
from equiformer2.training.figures import draw_error_bars, draw_parity
from equiformer2.training.metrics import FORCE_METRICS, S2EFMetrics, energy_metrics

UNITS = {"energy_mae": "eV", "energy_mse": "eV^2", "forces_mae": "eV/Å", "forces_mse": "(eV/Å)^2"} | {
    name: "eV/Å" for name in ("forcesx_mae", "forcesy_mae", "forcesz_mae", "forces_magnitude_error")
}
_FIGURE_POINTS = 50_000
#: Rises when the stored numbers change their meaning.
_STORED_VERSION = 2


@dataclass
class Evaluation:
    """Errors of a checkpoint on one dataset.

    Attributes:
        metrics: OC20's S2EF metrics, eV and eV/Å.
        baselines: `mean_energy` (of the training data, where the checkpoint knows it, else of these data),
            `data_mean_energy` (of these data), both with the linear references of a total-energy model;
            `system_mean_energy` (every system's own mean over this dataset: knows the answers, so only
            differences within a system are left; absent where systems have fewer than two structures on
            average); and `zero_force`.
        mean_energy_of: `training data` or `these data`: which mean `mean_energy` takes.
        structures, systems, free_atoms: how many were evaluated; without a free atom there are no force
            metrics.
        energy_pairs: `[n, 2]` target and predicted energy, eV.
        force_pairs: `[m, 2]` target and predicted force components of free atoms, eV/Å; an even sample.
        breakdown: the errors by adsorbate and by element.
    """

    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]]
    structures: int
    systems: int
    free_atoms: int
    energy_pairs: np.ndarray
    force_pairs: np.ndarray
    mean_energy_of: str = "these data"
    breakdown: Breakdown = field(default_factory=Breakdown)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain numbers for JSON; metrics that do not exist for this model are left out."""
        return {
            "structures": self.structures,
            "systems": self.systems,
            "free_atoms": self.free_atoms,
            "metrics": self.metrics,
            "baselines": self.baselines,
            "mean_energy_of": self.mean_energy_of,
            "adsorbates": self.breakdown.adsorbate_rows(),
            "elements": self.breakdown.element_rows(),
        }

    @classmethod
    def load(cls, path: AnyPath, settings: Mapping[str, Any]) -> "Evaluation | None":
        """Read an evaluation that `save` has written.

        Args:
            path: `.npz` file.
            settings: `evaluation_settings` of the evaluation that is asked for.

        Returns:
            The evaluation; None without such a file, for one of other settings, or a damaged one.
        """
        path = Path(path)
        if not path.is_file():
            return None
        try:
            stored, energy_pairs, force_pairs = read_npz(path, ("numbers", "energy_pairs", "force_pairs"))
            numbers = json.loads(str(stored))
            if numbers.pop("evaluated") != settings:
                return None
            numbers["breakdown"] = Breakdown(**numbers["breakdown"])
            return cls(energy_pairs=energy_pairs, force_pairs=force_pairs, **numbers)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            return None  # another version's: evaluating again is always right

    def save(self, path: AnyPath, settings: Mapping[str, Any]) -> None:
        """Write the evaluation to a `.npz` file, atomically, so that a stopped evaluation can continue.

        Args:
            path: file to write; its folder is made.
            settings: `evaluation_settings`.
        """
        names = ("metrics", "baselines", "mean_energy_of", "structures", "systems", "free_atoms")
        numbers = {"evaluated": settings, **{name: getattr(self, name) for name in names}}
        numbers["breakdown"] = self.breakdown.state()
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            numbers=np.array(json.dumps(numbers)),
            energy_pairs=self.energy_pairs,
            force_pairs=self.force_pairs,
        )
        write_bytes(path, buffer.getvalue(), make_folder=True)

    def table(self) -> str:
        """Format the main numbers, each beside its trivial baselines, as text."""
        metrics, baselines = self.metrics, self.baselines
        means = {f"mean energy of the {self.mean_energy_of}": baselines["mean_energy"]}
        means["mean energy of these data"] = baselines["data_mean_energy"]
        means = {name.replace("the these", "these"): values for name, values in means.items()}
        trivial = [f"{name} {values['energy_mae']:.4f}" for name, values in means.items()]
        if "system_mean_energy" in baselines:
            trivial.append(f"per-system mean {baselines['system_mean_energy']['energy_mae']:.4f}")
        within = [f"{name} {100 * values['energy_within_threshold']:.2f}" for name, values in means.items()]
        lines = [
            f"  energy MAE    {metrics['energy_mae']:8.4f} eV     ({', '.join(trivial)})",
            f"  EwT           {100 * metrics['energy_within_threshold']:8.2f} %      ({', '.join(within)})",
        ]
        if "forces_mae" in metrics:
            lines += [
                f"  force MAE     {metrics['forces_mae']:8.4f} eV/Å   "
                f"(zero force {baselines['zero_force']['forces_mae']:.4f})",
                f"  force cosine  {metrics['forces_cosine_similarity']:8.4f}        (zero force 0)",
                f"  EFwT          {100 * metrics['energy_forces_within_threshold']:8.2f} %",
            ]
        elif not self.free_atoms:
            lines.append("  forces are not judged, because every atom of these data is fixed")
        return "\n".join(lines)


def evaluation_settings(checkpoint: AnyPath, dataset: OC20Lmdb, **settings: Any) -> dict[str, Any]:
    """Collect everything that the numbers of an evaluation depend on, as plain values.

    Args:
        checkpoint: file of the checkpoint, told by its content.
        dataset: told by the names, sizes and times of its files.
        settings: further ones, such as weights and precision.

    Raises:
        OSError: a file is missing or unreadable.
    """
    files = [[shard.name, shard.stat().st_size, shard.stat().st_mtime_ns] for shard in dataset.shards]
    return {
        "version": _STORED_VERSION,
        "checkpoint": sha256(Path(checkpoint)),
        "energy_kind": dataset.energy_kind,
        "structures": len(dataset),
        "files": files,
        **settings,
    }


def parts_folder(report: AnyPath) -> Path:
    """Path of the folder with the finished datasets of an evaluation, beside its `report`."""
    report = Path(report)
    return report.with_name(f"{report.stem}.parts")


def open_dataset(path: str | Path, predictor: Predictor | Committee, energy_kind: str | None) -> OC20Lmdb:
    """Open a dataset (LMDB, or a small set of other files that ASE reads) for a checkpoint.

    Raises:
        InputError: the dataset's kind of energy is unknown or not the checkpoint's.
        datasets_oc20.DataError: the file cannot be used.
    """
    dataset = opening.open_dataset(path, energy_kind)
    if dataset.energy_kind is None:
        raise InputError(
            f"{path} does not say whether its energies are adsorption or total energies: give --energy-kind"
        )
    if dataset.energy_kind != predictor.energy_kind:
        raise InputError(
            f"{path} holds {dataset.energy_kind} energies, but the checkpoint predicts "
            f"{predictor.energy_kind} energies: the numbers cannot be compared"
        )
    return dataset


PredictBatches = Callable[[Iterable[Batch], int], Iterable[tuple[Batch, dict[str, Tensor]]]]
"""Function like `Predictor.predict_batches`: from batches and their number to each batch with its outputs."""


def predicted_batches(
    predict: PredictBatches,
    dataset: OC20Lmdb,
    batch_size: int,
    max_atoms: int | None,
    num_workers: int,
    forces: bool | None = None,
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Predict a dataset in stored order, with a progress bar on a terminal.

    Args:
        predict: `predict_batches` of a predictor.
        dataset: structures.
        batch_size: maximum number of structures per batch.
        max_atoms: maximum number of atoms per batch; None for no limit.
        num_workers: number of loader processes.
        forces: check that all structures have energies and, if true, forces to compare with; None: no check.

    Yields:
        A batch with its outputs, in eV and eV/Å.

    Raises:
        InputError: `num_workers` is negative, or a structure has no targets.
    """
    if num_workers < 0:
        raise InputError(f"num_workers is {num_workers}: give 0 or more")
    sampler = BalancedBatchSampler(
        len(dataset), batch_size, natoms=dataset.natoms if max_atoms else None, max_atoms=max_atoms
    )
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)

    def checked() -> Iterator[Batch]:
        for batch in loader:
            if forces is not None:
                check_targets(batch, forces, dataset.path)
            yield batch

    with tqdm(
        total=len(dataset), desc=str(dataset.path), unit="structures", disable=None, leave=False
    ) as progress:
        for batch, out in predict(checked(), len(loader)):
            yield batch, out
            progress.update(batch.num_graphs)


def evaluate(
    predictor: Predictor,
    dataset: OC20Lmdb,
    batch_size: int = 8,
    max_atoms: int | None = None,
    num_workers: int = 0,
    adsorbate_names: dict[str, str] | None = None,
) -> Evaluation:
    """Compute metrics and baselines of a checkpoint on a dataset of its kind of energy.

    Args:
        predictor: the checkpoint's.
        dataset: structures with targets.
        batch_size: maximum number of structures per batch.
        max_atoms: maximum number of atoms per batch; None for no limit.
        num_workers: number of loader processes.
        adsorbate_names: adsorbate by `sid`, for the errors by adsorbate.

    Raises:
        InputError: records without targets.
    """
    check_targets(dataset[0], predictor.has_forces, dataset.path)
    check_energies_match_kind(sample_targets(dataset, 200), str(dataset.energy_kind), dataset.path)
    normalizers = predictor.checkpoint.normalizers
    found, trivial = (S2EFMetrics(predictor.has_forces, sync_on_compute=False) for _ in range(2))
    breakdown = Breakdown(names=adsorbate_names)
    targets, predictions, sids, force_pairs, references = [], [], [], [], []
    free_atoms = 0
    for batch, out in predicted_batches(
        predictor.predict_batches, dataset, batch_size, max_atoms, num_workers, predictor.has_forces
    ):
        found.update(out, batch)
        trivial.update({name: torch.zeros_like(value) for name, value in out.items()}, batch)
        references.append(normalizers.reference_energy(batch, batch.num_graphs).numpy())
        breakdown.update(out, batch)
        targets.append(batch.energy.view(-1).double().numpy())
        predictions.append(out["energy"].view(-1).double().numpy())
        sids += [str(sid) for sid in batch.sid]
        free = ~batch.fixed.bool()
        free_atoms += int(free.sum())
        if predictor.has_forces:
            pair = torch.stack([batch.forces[free].reshape(-1), out["forces"][free].reshape(-1)], dim=1)
            quota = max(1, _FIGURE_POINTS * batch.num_graphs // len(dataset))
            force_pairs.append(pair.numpy()[:: max(1, -(-len(pair) // quota))])
    metrics, zero = (
        {
            name: float(value)
            for name, value in judged.compute().items()
            if free_atoms or name not in FORCE_METRICS
        }
        for judged in (found, trivial)
    )
    target = np.concatenate(targets)
    _, system = np.unique(sids, return_inverse=True)
    counts = np.bincount(system)
    systems = len(counts)
    reference = np.concatenate(references)
    training_mean = training_mean_energy(predictor)
    own_mean = float((target - reference).mean())
    baselines = {
        "mean_energy": energy_metrics(
            target, reference + (own_mean if training_mean is None else training_mean)
        ),
        "data_mean_energy": energy_metrics(target, reference + own_mean),
    }
    if len(target) >= 2 * systems:
        baselines["system_mean_energy"] = energy_metrics(
            target, (np.bincount(system, weights=target) / counts)[system]
        )
    if predictor.has_forces and free_atoms:
        judged_with_energy = "energy_forces_within_threshold"
        baselines["zero_force"] = {name: zero[name] for name in FORCE_METRICS if name != judged_with_energy}
    return Evaluation(
        metrics=metrics,
        baselines=baselines,
        structures=len(target),
        systems=systems,
        free_atoms=free_atoms,
        energy_pairs=np.stack([target, np.concatenate(predictions)], axis=1),
        force_pairs=np.concatenate(force_pairs) if force_pairs else np.zeros((0, 2)),
        mean_energy_of="these data" if training_mean is None else "training data",
        breakdown=breakdown,
    )


def training_mean_energy(predictor: Predictor) -> float | None:
    """Mean of the energies that the checkpoint was trained on, less its references, in eV; None if unknown.

    The mean of its normalizer says nothing of them: it may come from the checkpoint that a run started from.
    """
    known = predictor.checkpoint.provenance.get("training_data")
    mean = known.get("energy_mean_eV") if isinstance(known, dict) else None
    return float(mean) if isinstance(mean, int | float) and math.isfinite(mean) else None


def check_targets(data: Data, forces: bool, path: str) -> None:
    """Raise `InputError` for a structure, or a batch, without what is to be compared."""
    missing = [name for name in ("energy", "forces")[: 1 + forces] if name not in data]
    if missing:
        name = data.sid[0] if isinstance(data.sid, list) else data.sid
        raise InputError(
            f"{path} holds no targets to compare with (structure {name} has no {missing[0]}): "
            "use `equiformer2 predict`"
        )


def average(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Average metrics and baselines that every dataset has, unweighted.

    The paper averages over OC20's four validation splits in this way.
    """

    def mean(values: Sequence[dict[str, float]]) -> dict[str, float]:
        names = [name for name in values[0] if all(name in value for value in values)]
        return {name: float(np.mean([value[name] for value in values])) for name in names}

    return {
        "metrics": mean([evaluation.metrics for evaluation in evaluations]),
        "baselines": {
            name: mean([evaluation.baselines[name] for evaluation in evaluations])
            for name in evaluations[0].baselines
            if all(name in evaluation.baselines for evaluation in evaluations)
        },
    }


def report(predictor: Predictor, evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """Return all numbers of evaluations, by name of the dataset, as plain values for JSON."""
    checkpoint = predictor.checkpoint
    return {
        "source_format": checkpoint.source_format,
        "weights": checkpoint.weights,
        "energy_kind": checkpoint.energy_kind,
        "units": UNITS,
        "datasets": {path: evaluation.to_dict() for path, evaluation in evaluations.items()},
        "average": average(list(evaluations.values())),
        "all_datasets": pooled(evaluations),
    }


def draw_figures(folder: AnyPath, evaluations: dict[str, Evaluation]) -> list[Path]:
    """Parity figures of every dataset, and the errors by element and adsorbate over all of them.

    Returns:
        the files.
    """
    folder = Path(folder)
    written = []
    for number, (path, evaluation) in enumerate(evaluations.items()):
        for name, label, unit, pairs in (
            ("energy", "energy", "eV", evaluation.energy_pairs),
            ("forces", "force component", "eV/Å", evaluation.force_pairs),
        ):
            if len(pairs):
                note = f"{Path(path).stem}, MAE {evaluation.metrics[f'{name}_mae']:.4f} {unit}"
                stem = Path(path).stem if len(evaluations) == 1 else f"{number}_{Path(path).stem}"
                written.append(folder / f"parity_{name}_{stem}.png")
                draw_parity(pairs[:, 0], pairs[:, 1], label, unit, note, written[-1])
    for name, rows in pooled(evaluations).items():
        written.append(folder / f"errors_by_{name.removesuffix('s')}.png")
        draw_error_bars(rows, f"errors by {name.removesuffix('s')}", written[-1])
    return written


def pooled(evaluations: dict[str, Evaluation]) -> dict[str, Rows]:
    """Errors by adsorbate and element over all datasets together: every structure counts once."""
    pooled = Breakdown()
    for evaluation in evaluations.values():
        pooled.merge(evaluation.breakdown)
    return {"adsorbates": pooled.adsorbate_rows(), "elements": pooled.element_rows()}


def table_of_average(evaluations: Sequence[Evaluation]) -> str:
    """Format the mean over datasets as text: the error of a model on OC20 in papers."""
    metrics = average(evaluations)["metrics"]
    shown = [
        ("energy MAE", "energy_mae", 1.0, "eV"),
        ("EwT", "energy_within_threshold", 100.0, "%"),
        ("force MAE", "forces_mae", 1.0, "eV/Å"),
        ("force cosine", "forces_cosine_similarity", 1.0, ""),
        ("EFwT", "energy_forces_within_threshold", 100.0, "%"),
    ]
    return "\n".join(
        f"  {title:13} {factor * metrics[name]:8.{2 if unit == '%' else 4}f} {unit}".rstrip()
        for title, name, factor, unit in shown
        if name in metrics
    )

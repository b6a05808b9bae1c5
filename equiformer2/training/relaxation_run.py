"""IS2RE and IS2RS by relaxation: a dataset relaxed with a checkpoint, and how far from DFT that ends."""

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch_geometric.data import Data
from tqdm import tqdm

from datasets_oc20 import OC20Lmdb
from datasets_oc20.targets import check_energies_match_kind, sample_targets
from equiformer2.checkpoint.files import sha256
from equiformer2.errors import InputError
from equiformer2.files import write_bytes, write_json
from equiformer2.inference import Predictor
from equiformer2.inference.batched import RelaxationSettings, Relaxed, free_forces, relax_batched
from equiformer2.inference.relaxation_folder import RelaxationFolder, Row
from equiformer2.training.relaxation_metrics import (
    NEEDS_DFT,
    PositionErrors,
    is2re_metrics,
    is2rs_metrics,
    position_errors,
)

REPORT = "is2re.json"
RELAXED = "relaxed.npz"
UNITS = {
    "energy_mae": "eV",
    "energy_mse": "eV^2",
    "positions_mae": "Å",
    "positions_mse": "Å^2",
}


def relax_dataset(
    predictor: Predictor,
    checkpoint: Path,
    dataset: OC20Lmdb,
    folder: Path,
    settings: RelaxationSettings,
    batch_size: int = 32,
    max_atoms: int | None = None,
    router: str | None = None,
) -> dict[str, Any]:
    """Relax every structure of a dataset into a folder; goes on with a folder that is not finished.

    The folder holds what `RelaxationFolder` says and, once everything is relaxed, `relaxed.npz` (arrays over
    the structures in the dataset's order: `sid`, `energy` eV, `max_force` eV/Å, `steps`, `converged`) and
    `is2re.json`, which is also returned. Structures in flight when a run was killed start again.

    Args:
        predictor: with forces; its kind of energy is the dataset's (`evaluation.open_dataset`).
        checkpoint: the file that the predictor was made of.
        dataset: start structures, one per system, with `y_relaxed` and `pos_relaxed` where these are known.
        folder: output.
        settings: of the relaxations.
        batch_size, max_atoms: limits of a batch.
        router: the file of the predictor's router, if it has one.

    Raises:
        InputError: no forces, a folder with other relaxations, several structures with one `sid`, a start
            structure without a meaningful energy.
    """
    if not predictor.has_forces:
        raise InputError(
            f"{checkpoint} predicts no forces, so it cannot relax a structure: use a checkpoint trained with "
            "forces (model.forces)"
        )
    if "energy" in dataset[0]:
        check_energies_match_kind(sample_targets(dataset, 200), str(dataset.energy_kind), dataset.path)
    asked = {
        "checkpoint": sha256(checkpoint),
        "weights": predictor.checkpoint.weights,
        "precision": predictor.precision,
        "energy_kind": predictor.energy_kind,
        "data": [[shard.name, shard.stat().st_size] for shard in dataset.shards],
        "structures": len(dataset),
        **dataclasses.asdict(settings),
    }
    if router is not None:
        asked["router"] = sha256(router)
    relaxations = RelaxationFolder(folder, asked)
    with relaxations.open():
        progress = tqdm(
            total=len(dataset),
            initial=len(relaxations.rows),
            desc=str(dataset.path),
            unit="systems",
            disable=None,
            leave=False,
        )
        with progress:
            for relaxed in relax_batched(
                free_forces(predictor),
                _missing(dataset, relaxations),
                settings,
                batch_size=batch_size,
                max_atoms=max_atoms,
                device=predictor.device,
            ):
                relaxations.add(relaxed, _targets(relaxed))
                progress.update()
        rows = [relaxations.rows[index] for index in range(len(dataset))]
        _write_relaxed(folder / RELAXED, rows)
        report = {"energy_kind": predictor.energy_kind, "settings": asked, "units": UNITS, **judge(rows)}
        write_json(folder / REPORT, report)
    return report


def judge(rows: Sequence[Row]) -> dict[str, Any]:
    """Metrics of finished relaxations that have targets, beside those of not relaxing at all.

    `metrics` has the names of fairchem's evaluator. `not_relaxed` has the same of the start structures and
    of the model's energies of them. Either is without what has no target.
    """
    report: dict[str, Any] = {
        "structures": len(rows),
        "converged": sum(bool(row["converged"]) for row in rows),
        "failed": {row["sid"]: row["failure"] for row in rows if row["failure"] is not None},
        "mean_steps": float(np.mean([row["steps"] for row in rows])),
    }
    metrics: dict[str, dict[str, float]] = {"metrics": {}, "not_relaxed": {}}
    with_energy = [row for row in rows if "target_energy" in row]
    if with_energy:
        target = np.array([row["target_energy"] for row in with_energy])
        for name, key in (("metrics", "energy"), ("not_relaxed", "initial_energy")):
            metrics[name] |= is2re_metrics(target, np.array([row[key] for row in with_energy]))
    with_positions = [row for row in rows if "positions" in row]
    if with_positions:
        for name, key in (("metrics", "positions"), ("not_relaxed", "initial_positions")):
            metrics[name] |= is2rs_metrics([PositionErrors(**row[key]) for row in with_positions])
    report |= {"with_energy": len(with_energy), "with_positions": len(with_positions), **metrics}
    return report | {"not_calculated": NEEDS_DFT}


def average_over(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Unweighted mean over datasets of the metrics that all of them have."""
    metrics = [report["metrics"] for report in reports.values()]
    names = [name for name in metrics[0] if all(name in values for values in metrics)]
    return {name: float(np.mean([values[name] for values in metrics])) for name in names}


def relaxation_table(report: Mapping[str, Any]) -> str:
    """The main numbers as text, each beside that of the start structures."""
    lines = [
        f"  {report['converged']} of {report['structures']} converged, {report['mean_steps']:.1f} steps each"
        + (f", {len(report['failed'])} ended early" if report["failed"] else "")
    ]
    return "\n".join(lines + metric_lines(report["metrics"], report["not_relaxed"]))


def metric_lines(metrics: Mapping[str, float], not_relaxed: Mapping[str, float] | None = None) -> list[str]:
    """One line per metric of the leaderboard and of fairchem's evaluator."""
    lines = []
    for title, name, factor, unit in (
        ("energy MAE", "energy_mae", 1.0, "eV"),
        ("EwT", "energy_within_threshold", 100.0, "%"),
        ("ADwT", "positions_average_distance_within_threshold", 100.0, "%"),
        ("position MAE", "positions_mae", 1.0, "Å"),
    ):
        if name in metrics:
            digits = 2 if unit == "%" else 4
            beside = f"   (not relaxed {factor * not_relaxed[name]:.{digits}f})" if not_relaxed else ""
            lines.append(f"  {title:12} {factor * metrics[name]:8.{digits}f} {unit:2}{beside}".rstrip())
    return lines


def _missing(dataset: OC20Lmdb, relaxations: RelaxationFolder) -> Iterator[tuple[int, Data]]:
    for index in range(len(dataset)):
        if index not in relaxations.rows:
            start = dataset[index]
            relaxations.check_name(index, str(start.sid))
            yield index, start


def _targets(relaxed: Relaxed) -> dict[str, Any]:
    """What DFT says of this system, and how far off the relaxation and its start are."""
    start = relaxed.start
    found: dict[str, Any] = {}
    if "y_relaxed" in start:
        found["target_energy"] = float(start.y_relaxed)
    if "pos_relaxed" in start:
        free = ~start.fixed.bool().numpy()
        target, cell, pbc = start.pos_relaxed.numpy()[free], start.cell[0].numpy(), start.pbc[0].numpy()
        for name, positions in (("positions", relaxed.positions), ("initial_positions", start.pos.numpy())):
            found[name] = dataclasses.asdict(position_errors(positions[free], target, cell, pbc))
    return found


def _write_relaxed(target: Path, rows: Sequence[Row]) -> None:
    buffer = io.BytesIO()
    names = ("sid", "energy", "max_force", "steps", "converged")
    np.savez_compressed(buffer, **{name: np.array([row[name] for row in rows]) for name in names})  # type: ignore[arg-type]
    write_bytes(target, buffer.getvalue())

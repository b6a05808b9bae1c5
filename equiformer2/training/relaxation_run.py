"""Relax a dataset with a checkpoint and compare the results with DFT (OC20's tasks IS2RE and IS2RS).

A structure that cannot be relaxed (its record is damaged or holds NaN, the network does not know an element,
it has no cell, …) is skipped and named with the reason; every number is then said to be of N of M structures.
"""

import copy
import dataclasses
import io
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.geometry import complete_cell
from torch_geometric.data import Data
from tqdm import tqdm

from datasets_oc20 import DataError, OC20Lmdb
from datasets_oc20.targets import check_energies_match_kind, sample_targets
from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import write_bytes, write_json
from equiformer2.inference import Predictor
from equiformer2.inference.batched import RelaxationSettings, Relaxed, free_forces, relax_batched
from equiformer2.inference.committee import Committee
from equiformer2.inference.engines import NetworkEngine
from equiformer2.inference.record import adapter_record
from equiformer2.inference.relaxation_folder import SKIPPED, RelaxationFolder, Row
from equiformer2.training.evaluation import open_dataset
from equiformer2.training.metrics import energy_metrics

#: ADwT counts the systems whose mean distance lies below each of these, Å.
DISTANCE_THRESHOLDS = np.arange(0.01, 0.5, 0.001)
#: Metrics of the leaderboard that cannot be had from predictions and targets.
NEEDS_DFT = {
    "forces_below_threshold": "FbT needs a DFT single point of every relaxed structure",
    "average_forces_below_threshold": "AFbT needs a DFT single point of every relaxed structure",
}


@dataclass(frozen=True)
class PositionErrors:
    """Distance of one relaxed system from its target.

    Attributes:
        components: position components of free atoms.
        absolute: sum of their absolute errors, Å. No periodic images, as in the reference.
        squared: sum of their squared errors, Å².
        distance: mean distance of free atoms to the nearest image of their targets, Å.
    """

    components: int
    absolute: float
    squared: float
    distance: float


def position_errors(
    positions: np.ndarray, target: np.ndarray, cell: np.ndarray, pbc: np.ndarray
) -> PositionErrors:
    """Measure the errors of the n free atoms of one system.

    Args:
        positions: `[n, 3]` Å, relaxed by the model.
        target: `[n, 3]` Å, relaxed by DFT.
        cell: `[3, 3]` Å, rows are lattice vectors; those of non-periodic directions may be zero.
        pbc: `[3]` periodic directions.
    """
    error = positions - target
    cell = complete_cell(cell)
    fractional = np.linalg.solve(cell.T, error.T).T
    fractional = np.where(pbc, fractional - np.ceil(fractional - 0.5), fractional)
    distances = np.linalg.norm(fractional @ cell, axis=1)
    return PositionErrors(
        components=error.size,
        absolute=float(np.abs(error).sum(dtype=np.float64)),
        squared=float(np.square(error).sum(dtype=np.float64)),
        distance=float(distances.mean()) if len(distances) else 0.0,
    )


def is2rs_metrics(errors: Sequence[PositionErrors]) -> dict[str, float]:
    """`positions_mae` Å, `positions_mse` Å² and ADwT over systems; nothing where no atom is free.

    Average distance within threshold: the share of systems whose mean distance lies below a threshold,
    averaged over thresholds from 0.01 to 0.5 Å.
    """
    components = sum(error.components for error in errors)
    if not components:
        return {}
    distances = np.array([error.distance for error in errors])
    return {
        "positions_mae": sum(error.absolute for error in errors) / components,
        "positions_mse": sum(error.squared for error in errors) / components,
        "positions_average_distance_within_threshold": float(
            (distances[:, None] < DISTANCE_THRESHOLDS).mean()
        ),
    }


logger = logging.getLogger(__name__)

REPORT = "is2re.json"
RELAXED = "relaxed.npz"
UNITS = {
    "energy_mae": "eV",
    "energy_mse": "eV^2",
    "positions_mae": "Å",
    "positions_mse": "Å^2",
}
_MOST_NAMED = 20


def open_starts(path: str | Path, predictor: Predictor | Committee, energy_kind: str | None) -> OC20Lmdb:
    """Open start structures for a checkpoint; where none has an energy, no kind of energy has to be declared.

    Raises:
        InputError: they have energies of an unknown kind, or of another kind than the checkpoint's.
        DataError: the file cannot be used.
    """
    if energy_kind is None:
        dataset = OC20Lmdb(path)

        def has_energy(index: int) -> bool:
            try:
                start = dataset[index]
            except DataError:  # named when it is its turn to be relaxed
                return False
            return "energy" in start or "y_relaxed" in start

        if dataset.energy_kind is None and not any(map(has_energy, range(len(dataset)))):
            return OC20Lmdb(path, predictor.energy_kind)
    return open_dataset(path, predictor, energy_kind)


def relax_dataset(
    predictor: Predictor | Committee,
    checkpoint: AnyPath | Sequence[AnyPath],
    dataset: OC20Lmdb,
    folder: AnyPath,
    settings: RelaxationSettings,
    batch_size: int = 32,
    max_atoms: int | None = None,
    router: str | None = None,
) -> dict[str, Any]:
    """Relax every structure of a dataset into a folder; goes on with a folder that is not finished.

    The folder holds what `RelaxationFolder` says and, once everything is relaxed, `relaxed.npz` (arrays over
    the relaxed structures in the dataset's order: `sid`, `energy` eV, `max_force` eV/Å, `steps`, `converged`;
    and `skipped`, the names of the others) and `is2re.json`, which is also returned. Structures in flight
    when a run was killed start again.

    Args:
        predictor: with forces, or a committee; its kind of energy is the dataset's
            (`evaluation.open_dataset`).
        checkpoint: the file that the predictor was made of, or the files of a committee.
        dataset: start structures, one per system, with `y_relaxed` and `pos_relaxed` where these are known.
        folder: output.
        settings: of the relaxations.
        batch_size, max_atoms: limits of a batch; a structure of more atoms is relaxed alone.
        router: the file of the predictor's router, if it has one.

    Raises:
        InputError: no forces, `max_atoms` below every structure, a folder with other relaxations or of other
            start structures, several structures with one `sid`, not one structure that can be relaxed.
    """
    folder = Path(folder)
    files = [checkpoint] if isinstance(checkpoint, str | os.PathLike) else list(checkpoint)
    if not predictor.has_forces:
        raise InputError(
            f"{files[0]} predicts no forces, so it cannot relax a structure: use a checkpoint trained with "
            "forces (model.forces)"
        )
    if max_atoms is not None:
        # A record that cannot be used is skipped when it is its turn.
        with suppress(DataError):
            natoms = np.asarray(dataset.natoms)
            if natoms.min() > max_atoms:
                raise InputError(
                    f"max_atoms is {max_atoms}, but the smallest structure of {dataset.path} has "
                    f"{natoms.min()} atoms: give at least as many, or leave it out"
                )
            if natoms.max() > max_atoms:
                logger.warning(
                    f"{int((natoms > max_atoms).sum())} of {len(natoms)} structures of {dataset.path} have "
                    f"more than {max_atoms} atoms, up to {natoms.max()}: each of them is relaxed alone"
                )
    sample = sample_targets(dataset, 200, leave_out_unusable=True)
    if len(sample.energy):
        check_energies_match_kind(sample, str(dataset.energy_kind), dataset.path)
    asked = {
        "checkpoint": sha256(files[0]) if len(files) == 1 else [sha256(file) for file in files],
        "weights": predictor.checkpoint.weights,
        "precision": predictor.precision,
        "energy_kind": predictor.energy_kind,
        "structures": len(dataset),
        **dataclasses.asdict(settings),
    }
    if router is not None:
        asked["router"] = sha256(router)
        if predictor.energies_apart:  # earlier versions wrote the router's, which do not go with these
            asked["whole_energies"] = True
    adapter = adapter_record(predictor)
    if adapter:  # one that was made in Python has no file
        weights = NetworkEngine(predictor).identity()["weights_sha256"]
        asked["adapter"] = adapter["adapter_sha256"] or weights
    relaxations = RelaxationFolder(folder, asked)
    with relaxations.open():
        finished = sorted(relaxations.rows)
        for index in tqdm(finished, desc="comparing", unit="systems", disable=None, leave=False):
            try:
                start = dataset[index]
            except DataError as error:
                sid = relaxations.rows[index]["sid"]
                raise InputError(
                    f"{relaxations.path} holds a relaxation of system {sid}, whose record cannot be used "
                    f"now: give another folder or the data as they were ({error})"
                ) from error
            relaxations.check_start(index, start)
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
                _missing(dataset, relaxations, progress),
                settings,
                batch_size=batch_size,
                max_atoms=max_atoms,
                device=predictor.device,
            ):
                if isinstance(predictor, Predictor) and predictor.energies_apart:
                    _compute_whole_energies(predictor, relaxed)
                if relaxed.frames:
                    relaxations.add(relaxed, _targets(relaxed))
                else:
                    relaxations.skip(relaxed.index, str(relaxed.start.sid), str(relaxed.failure))
                progress.update()
        skipped = [relaxations.skipped[index] for index in sorted(relaxations.skipped)]
        if not relaxations.rows:
            raise InputError(
                f"{dataset.path}: none of its {len(dataset)} structures can be relaxed, "
                f"{skipped[0]['name']} for instance: {skipped[0]['reason']} (all are in {folder / SKIPPED})"
            )
        rows = [relaxations.rows[index] for index in sorted(relaxations.rows)]
        names = ("sid", "energy", "max_force", "steps", "converged")
        arrays = {name: np.array([row[name] for row in rows]) for name in names}
        for name in ("energy_std", "max_force_std"):
            if name in rows[0]:
                arrays[name] = np.array([row[name] for row in rows])
        arrays["skipped"] = np.array([row["name"] for row in skipped], dtype=str)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_bytes(folder / RELAXED, buffer.getvalue())
        report = {
            "energy_kind": predictor.energy_kind,
            **adapter,
            "settings": asked,
            "units": UNITS,
            **judge(rows, skipped),
        }
        write_json(folder / REPORT, report)
    return report


def judge(rows: Sequence[Row], skipped: Sequence[Row] = ()) -> dict[str, Any]:
    """Compute the metrics of finished relaxations that have targets, beside those of not relaxing at all.

    `metrics` has the names of fairchem's evaluator. `not_relaxed` has the same of the start structures and
    of the model's energies of them. Either is without what has no target. All numbers are of the `relaxed` of
    all `structures`; `skipped` names the others.
    """
    report: dict[str, Any] = {
        "structures": len(rows) + len(skipped),
        "relaxed": len(rows),
        "skipped": list(skipped),
        "converged": sum(bool(row["converged"]) for row in rows),
        "failed": {row["sid"]: row["failure"] for row in rows if row["failure"] is not None},
        "stopped": {row["sid"]: row["stopped"] for row in rows if row.get("stopped")},
        "mean_steps": float(np.mean([row["steps"] for row in rows])),
    }
    metrics: dict[str, dict[str, float]] = {"metrics": {}, "not_relaxed": {}}
    with_energy = [row for row in rows if "target_energy" in row]
    if with_energy:
        target = np.array([row["target_energy"] for row in with_energy])
        for name, key in (("metrics", "energy"), ("not_relaxed", "initial_energy")):
            metrics[name] |= energy_metrics(target, np.array([row[key] for row in with_energy]))
    with_positions = [row for row in rows if "positions" in row]
    if with_positions:
        for name, key in (("metrics", "positions"), ("not_relaxed", "initial_positions")):
            metrics[name] |= is2rs_metrics([PositionErrors(**row[key]) for row in with_positions])
    report |= {"with_energy": len(with_energy), "with_positions": len(with_positions), **metrics}
    return report | {"not_calculated": NEEDS_DFT}


def average_over(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Average the metrics that all datasets have, unweighted."""
    metrics = [report["metrics"] for report in reports.values()]
    names = [name for name in metrics[0] if all(name in values for values in metrics)]
    return {name: float(np.mean([values[name] for values in metrics])) for name in names}


def relaxation_table(report: Mapping[str, Any]) -> str:
    """Format the main numbers as text, each beside that of the start structures, and what they leave out."""
    lines = [
        f"  {report['converged']} of {report['relaxed']} converged, {report['mean_steps']:.1f} steps each"
        + (f", {len(report['failed'])} ended early" if report["failed"] else "")
        + (f", {len(report['stopped'])} ended by the committee's spread" if report["stopped"] else "")
    ]
    lines += metric_lines(report["metrics"], report["not_relaxed"])
    skipped = report["skipped"]
    if skipped:
        lines.append(
            f"  All of this is of {coverage([report])}: {len(skipped)} cannot be relaxed and were skipped"
        )
        lines += [f"    {row['name']}: {row['reason']}" for row in skipped[:_MOST_NAMED]]
        if len(skipped) > _MOST_NAMED:
            lines.append(f"    and {len(skipped) - _MOST_NAMED} more, see {SKIPPED}")
    return "\n".join(lines)


def coverage(reports: Iterable[Mapping[str, Any]]) -> str:
    """Count the structures behind the numbers of `reports`: "97 of 100 structures"."""
    counts = [(report["relaxed"], report["structures"]) for report in reports]
    relaxed, structures = (sum(column) for column in zip(*counts, strict=True))
    return f"{relaxed} of {structures} structures"


def metric_lines(metrics: Mapping[str, float], not_relaxed: Mapping[str, float] | None = None) -> list[str]:
    """Format one line per metric of the leaderboard and of fairchem's evaluator."""
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


def _missing(
    dataset: OC20Lmdb, relaxations: RelaxationFolder, progress: "tqdm[Any]"
) -> Iterator[tuple[int, Data]]:
    """Iterate over the structures that are not finished; records that cannot be used are skipped."""
    for index in range(len(dataset)):
        if index in relaxations.rows:
            continue
        try:
            start = dataset[index]
        except DataError as error:
            relaxations.skip(index, error.sid or f"structure {index}", str(error))
            progress.update()
            continue
        relaxations.check_name(index, str(start.sid))
        yield index, start


def _compute_whole_energies(predictor: Predictor, relaxed: Relaxed) -> None:
    """Give the first and the last frame the energy of the whole network, the others none.

    Routers keep forces better than energies, and no other frame's energy is read. A relaxation without these
    energies has failed as if it had never begun.
    """
    last = len(relaxed.frames) - 1
    for number, frame in enumerate(relaxed.frames):
        energy = math.nan
        if number in (0, last):
            at = copy.copy(relaxed.start)
            at.pos = torch.as_tensor(frame.positions)
            none = torch.zeros(len(at.pos), dtype=torch.bool)
            try:
                energy = float(predictor.predict(at, force_atoms=none, routed=False)["energy"])
            except InputError as error:
                relaxed.failure, relaxed.frames = str(error), []
                return
        relaxed.frames[number] = dataclasses.replace(frame, energy=energy)


def _targets(relaxed: Relaxed) -> dict[str, Any]:
    """Collect the system's DFT targets, and the errors of the relaxation and of its start."""
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

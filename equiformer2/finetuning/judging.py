"""Errors of networks and of trivial answers on frames, over all of them and by system."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datasets_oc20 import OC20Lmdb
from equiformer2.checkpoint import Normalizers
from equiformer2.finetuning.parity import ParityPairs
from equiformer2.inference import Predictor
from equiformer2.training.evaluation import predicted_batches

NEW, OLD = "new", "old"
BEFORE, AFTER, SCRATCH, TRIVIAL = "before", "after", "scratch", "trivial"
MISSING = "-"
_SHOWN_SYSTEMS = 20


@dataclass(frozen=True)
class _OfSystem:
    """Errors on the frames of one system; energies in eV, forces in eV/Å; None where there are none."""

    frames: int
    energy_mae_eV: float | None  # noqa: N815  # a key of results files
    force_mae_eV_A: float | None  # noqa: N815


@dataclass(frozen=True)
class Errors:
    """Errors on a set of frames.

    Attributes:
        frames, systems: how many.
        energy_mae_eV: mean over the frames; None where energies cannot be compared.
        energy_mae_eV_per_atom: the same, each divided by the number of atoms.
        force_mae_eV_A: mean over the force components of free atoms; None without forces.
        by_system: errors of every system.
    """

    frames: int
    systems: int
    energy_mae_eV: float | None  # noqa: N815
    energy_mae_eV_per_atom: float | None  # noqa: N815
    force_mae_eV_A: float | None  # noqa: N815
    by_system: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values."""
        return asdict(self)


class _Sums:
    """Errors collected over batches."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[float, float, float, int]]] = {}

    def add(self, system: str, atoms: int, energy: float, forces: np.ndarray) -> None:
        """Add a frame: energy error in eV (NaN for none) and force errors `[n, 3]` in eV/Å."""
        row = (abs(energy), abs(energy) / atoms, float(np.abs(forces).sum()), forces.size)
        self._rows.setdefault(system, []).append(row)

    def errors(self) -> Errors:
        """Average over frames, and over force components."""

        def known(value: float) -> float | None:
            return float(value) if np.isfinite(value) else None

        def means(rows: np.ndarray) -> tuple[float | None, float | None, float | None]:
            components = rows[:, 3].sum()
            force = rows[:, 2].sum() / components if components else np.nan
            return known(rows[:, 0].mean()), known(rows[:, 1].mean()), known(force)

        parts = {system: np.array(rows) for system, rows in self._rows.items()}
        energy, per_atom, force = means(np.concatenate(list(parts.values())))
        by_system = {}
        for system, rows in sorted(parts.items()):
            own_energy, _, own_force = means(rows)
            by_system[system] = asdict(_OfSystem(len(rows), own_energy, own_force))
        frames = sum(map(len, parts.values()))
        return Errors(frames, len(parts), energy, per_atom, force, by_system)


def judge(
    predictor: Predictor,
    dataset: OC20Lmdb,
    energies: bool,
    pairs: ParityPairs | None = None,
    batch_size: int = 4,
) -> Errors:
    """Compute the errors of a network.

    Args:
        predictor: the network's.
        dataset: frames with energies and perhaps forces.
        energies: whether the network's energies have the kind and the zero of the frames'.
        pairs: gets labels and predictions.
        batch_size: frames per batch.
    """
    sums = _Sums()
    forces = "forces" in dataset.fields(0) and predictor.has_forces
    for batch, out in predicted_batches(predictor.predict_batches, dataset, batch_size, None, 0):
        free = ~batch.fixed.bool()
        for index in range(batch.num_graphs):
            atoms = slice(int(batch.ptr[index]), int(batch.ptr[index + 1]))
            label, found = np.zeros((0, 3)), np.zeros((0, 3))
            if forces:
                chosen = free[atoms]
                label, found = (
                    each[atoms][chosen].double().numpy() for each in (batch.forces, out["forces"])
                )
            energy = float(batch.energy[index]), float(out["energy"][index]) if energies else float("nan")
            count = atoms.stop - atoms.start
            sums.add(str(batch.sid[index]), count, energy[1] - energy[0], found - label)
            if pairs is not None:
                pairs.add(batch.atomic_numbers[atoms], energy, (label, found))
    return sums.errors()


def judge_trivial(normalizers: Normalizers, dataset: OC20Lmdb) -> Errors:
    """Compute the errors of the mean energy with the references, and of zero forces.

    Args:
        normalizers: of the training data.
        dataset: frames with energies and perhaps forces.
    """
    sums = _Sums()
    for row in range(len(dataset)):
        data = dataset[row]
        answer = float(normalizers.reference_energy(data, 1)[0]) + normalizers.energy.mean
        forces = data.forces[~data.fixed.bool()].double().numpy() if "forces" in data else np.zeros((0, 3))
        sums.add(str(data.sid), int(data.natoms), answer - float(data.energy), forces)
    return sums.errors()


def row_of(data: str, network: str, errors: Errors, seed: int | None = None) -> dict[str, Any]:
    """Make a row of the table."""
    row = {"data": data, "network": network, **errors.to_dict()}
    return row if seed is None else {**row, "seed": seed}


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the rows of one network over seeds: means, and the standard deviations and seeds beside them."""
    first = rows[0]
    joined = {name: value for name, value in first.items() if name != "seed"}
    if len(rows) == 1:
        return joined
    for name in ("energy_mae_eV", "energy_mae_eV_per_atom", "force_mae_eV_A"):
        values = [row[name] for row in rows]
        if None in values:
            continue
        joined[name] = float(np.mean(values))
        joined[f"{name}_std"] = float(np.std(values, ddof=1))
    for system, errors in joined["by_system"].items():
        own = [row["by_system"][system] for row in rows]
        joined["by_system"][system] = {
            name: None if value is None else float(np.mean([each[name] for each in own]))
            for name, value in errors.items()
        } | {"frames": errors["frames"]}
    return {**joined, "seeds": [row["seed"] for row in rows]}


def to_text(table: Sequence[Mapping[str, Any]], per_atom: bool) -> str:
    """Format the table, and the errors by system of the networks before and after.

    Args:
        table: rows of `row_of` or `over_seeds`.
        per_atom: also energies per atom, of total energies.
    """

    def number(row: Mapping[str, Any], name: str) -> str:
        value, spread = row.get(name), row.get(f"{name}_std")
        if value is None:
            return MISSING
        return f"{value:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")

    columns = [("energy MAE (eV)", "energy_mae_eV")]
    if per_atom:
        columns.append(("per atom (eV)", "energy_mae_eV_per_atom"))
    columns.append(("force MAE (eV/Å)", "force_mae_eV_A"))
    lines = [
        f"{'data':5}{'network':9}" + "".join(f"{title:>19}" for title, _ in columns) + "  frames  systems"
    ]
    for row in table:
        values = "".join(f"{number(row, name):>19}" for _, name in columns)
        lines.append(f"{row['data']:5}{row['network']:9}{values}{row['frames']:>8}{row['systems']:>9}")
    shown = {(row["data"], row["network"]): row["by_system"] for row in table}
    before, after = (shown.get((NEW, name)) for name in (BEFORE, AFTER))
    if before and after and len(after) > 1:
        lines += [
            "",
            f"{'new data by system':40}{'frames':>7}{'energy, before':>16}{'after':>9}"
            f"{'forces':>9}{'after':>9}",
        ]
        for system in list(after)[:_SHOWN_SYSTEMS]:
            cells = [each[system] for each in (before, after)]
            errors = "".join(
                f"{number(cell, name):>{width}}"
                for name, widths in (("energy_mae_eV", (16, 9)), ("force_mae_eV_A", (9, 9)))
                for cell, width in zip(cells, widths, strict=True)
            )
            lines.append(f"{system[:39]:40}{after[system]['frames']:>7}{errors}")
        if len(after) > _SHOWN_SYSTEMS:
            lines.append(f"… and {len(after) - _SHOWN_SYSTEMS} more in finetune.json")
    return "\n".join(lines)

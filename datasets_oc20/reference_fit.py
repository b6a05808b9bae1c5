"""Fit of per-element reference energies to a dataset of total energies."""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from datasets_oc20.atomic import whole_file
from datasets_oc20.errors import DataError
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.target_sums import TargetSums, sum_targets
from datasets_oc20.targets import (
    check_energies_match_kind,
    fit_linear_references,
    known_spread,
    sample_targets,
)

_CHECKED_RECORDS = 200


@dataclass(frozen=True)
class ReferenceFit:
    """References of a dataset and the statistics of its energies without and with them.

    Attributes:
        path: path of the dataset.
        sums: over its frames.
        coefficients: `[100]` eV per atomic number.
        mean: mean of the energy, eV.
        std: standard deviation of the energy, eV.
        residual_mean: mean of the energy less the references, eV.
        residual_std: standard deviation of the energy less the references, eV.
        undetermined: elements for whose references the data determine only sums with others.
    """

    path: str
    sums: TargetSums
    coefficients: np.ndarray
    mean: float
    std: float
    residual_mean: float
    residual_std: float
    undetermined: list[int]

    @property
    def elements(self) -> list[int]:
        """Atomic numbers in the data, ascending."""
        return [int(number) for number in np.flatnonzero(self.sums.atoms)]

    def to_record(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "data": self.path,
            "energy_kind": "total",
            "frames": self.sums.frames,
            "energy": {"mean": self.mean, "std": self.std},
            "residual": {"mean": self.residual_mean, "std": self.residual_std},
            "forces_rms": self.sums.forces_rms,
            "units": {"energy": "eV", "forces": "eV/Å"},
            "elements": [
                {
                    "element": chemical_symbols[number],
                    "atomic_number": number,
                    "atoms": int(self.sums.atoms[number]),
                    "reference": float(self.coefficients[number]),
                    "determined": number not in self.undetermined,
                }
                for number in self.elements
            ],
        }


def fit_references(dataset: OC20Lmdb, num_workers: int | None = None, progress: bool = False) -> ReferenceFit:
    """Read every frame once and fit the references.

    Args:
        dataset: frames with total energies.
        num_workers: number of processes; None takes one per core.
        progress: show a bar on a terminal.

    Raises:
        DataError: the energies are adsorption energies or of an undeclared kind, cannot be total energies,
            or a record has no energy.
    """
    if dataset.energy_kind is None:
        raise DataError(
            f"{dataset.path}: the file does not say whether its energies are adsorption or total energies; "
            "say it (--energy-kind total)."
        )
    if dataset.energy_kind != "total":
        raise DataError(
            f"{dataset.path}: holds adsorption energies, which are total energies less those of the clean "
            "slab and of the adsorbate's reference molecules; what elements contribute cancels in them, so "
            "they need no linear references; fit to total energies "
            "(`equiformer2 data preprocess --energy total`)."
        )
    sample = sample_targets(dataset, _CHECKED_RECORDS)
    check_energies_match_kind(sample, "total", dataset.path)
    sums = sum_targets(dataset, num_workers, progress, fit_linear_references(sample).numpy())
    coefficients = sums.references()
    mean, std = sums.energy_statistics()
    residual_mean, residual_std = sums.energy_statistics(coefficients)
    return ReferenceFit(
        dataset.path, sums, coefficients, mean, std, residual_mean, residual_std, sums.undetermined()
    )


def write_references(fit: ReferenceFit, path: str | os.PathLike[str]) -> None:
    """Write an `.npz` for `data.normalizers.linear_references` atomically.

    Its arrays are `coeff [100]` (eV per atomic number), `atoms [100]` (atoms in the data) and `provenance`
    (JSON).

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    provenance = {
        **{name: value for name, value in fit.to_record().items() if name != "elements"},
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with whole_file(Path(path)) as file:
        np.savez(
            file,
            coeff=fit.coefficients,
            atoms=fit.sums.atoms.astype(np.int64),
            provenance=np.array(json.dumps(provenance)),
        )


def to_text(fit: ReferenceFit, out: str) -> str:
    """Format the table of elements, the statistics, and the lines for a training configuration.

    Args:
        fit: the references.
        out: path of the `.npz` file, for the configuration.
    """
    lines = [f"{fit.path}: {fit.sums.frames} frames", "", "element      atoms  reference (eV)"]
    lines += [
        f"{chemical_symbols[number]:<7} {int(fit.sums.atoms[number]):>10}  {fit.coefficients[number]:14.4f}"
        + (" *" if number in fit.undetermined else "")
        for number in fit.elements
    ]
    if fit.undetermined:
        lines.append("* only sums with other elements are determined by the data; shared out evenly (ridge)")
    missing = fit.coefficients[[number for number in range(1, 100) if number not in fit.elements]]
    if len(missing):
        lines.append(f"elements that are not in the data: {missing[0]:.4f}, the mean energy per atom")
    forces = fit.sums.forces_rms
    lines += [
        "",
        f"energy                  {fit.mean:.4f} ± {fit.std:.4f} eV",
        f"less linear references  {fit.residual_mean:.4f} ± {fit.residual_std:.4f} eV",
        "",
        "For the configuration of a training run:",
        "data:",
        "  normalizers:",
        f"    energy_mean: {fit.residual_mean:.6g}",
        f"    energy_std: {known_spread(fit.residual_std, 'energies', 'eV'):.6g}",
        f"    forces_std: {known_spread(forces, 'forces', 'eV/Å'):.6g}",
        f"    linear_references: {out}",
    ]
    return "\n".join(lines)

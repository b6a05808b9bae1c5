"""Targets of a dataset: the kind of its energies, per-element references, mean and spread."""

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from datasets_oc20.errors import DataError
from datasets_oc20.reader import OC20Lmdb

NUM_ELEMENTS = 100
# OC20 keeps |adsorption energy| <= 10 eV; DFT total energies of its slabs are tens to thousands of eV.
_LARGEST_ADSORPTION_MEAN = 50.0
_SMALLEST_TOTAL_MEAN, _SMALLEST_TOTAL_PER_ATOM = 10.0, 0.5
# Weight of the pull to the mean energy per atom, in units of one structure with one such atom.
_RIDGE = 1e-3


class NormalizerStatistics(TypedDict):
    """Mean and spread of the targets: (mean, std) of the energy in eV, (0, rms) of the forces in eV/Å."""

    energy: tuple[float, float]
    forces: tuple[float, float]


@dataclass(frozen=True)
class TargetSample:
    """The targets of a sample of a dataset.

    `composition [n, 100]` atoms per element (column = atomic number), `energy [n]` eV,
    `forces_rms` eV/Å root mean square of a force component over the free atoms (None without forces).
    """

    composition: np.ndarray
    energy: np.ndarray
    forces_rms: float | None


def sample_targets(dataset: OC20Lmdb, limit: int = 50_000) -> TargetSample:
    """Read the targets of at most `limit` records, evenly spaced over the dataset.

    Raises:
        DataError: a record has no energy, or an element above 99.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(np.int64))
    composition = np.zeros((len(indices), NUM_ELEMENTS))
    energy = np.zeros(len(indices))
    squares, components = 0.0, 0
    for row, index in enumerate(indices.tolist()):
        data = dataset[index]
        if "energy" not in data:
            raise DataError(f"{dataset.describe(index)}: the record has no energy to train on.")
        if int(data.atomic_numbers.max()) >= NUM_ELEMENTS:
            raise DataError(f"{dataset.describe(index)}: an element above 99 has no reference energy.")
        composition[row] = np.bincount(data.atomic_numbers.numpy(), minlength=NUM_ELEMENTS)
        energy[row] = data.energy.item()
        if "forces" in data:
            free = data.forces[~data.fixed].double()
            squares += float((free * free).sum())
            components += free.numel()
    rms = float(np.sqrt(squares / components)) if components else None
    return TargetSample(composition, energy, rms)


def check_energies_match_kind(sample: TargetSample, kind: str, name: str) -> None:
    """Raise `DataError` when the energies cannot be of the declared kind."""
    mean = float(np.abs(sample.energy).mean())
    per_atom = float((np.abs(sample.energy) / sample.composition.sum(axis=1)).mean())
    if kind == "adsorption" and mean > _LARGEST_ADSORPTION_MEAN:
        raise DataError(
            f"{name}: declared as adsorption energies, but their mean size is {mean:.1f} eV, as of total "
            "energies; declare energy_kind total, or preprocess with the reference energies."
        )
    if kind == "total" and mean < _SMALLEST_TOTAL_MEAN and per_atom < _SMALLEST_TOTAL_PER_ATOM:
        raise DataError(
            f"{name}: declared as total energies, but their mean size is {mean:.2f} eV, as of adsorption "
            "energies; declare energy_kind adsorption."
        )


def fit_linear_references(data: OC20Lmdb | TargetSample) -> torch.Tensor:
    """Per-element references for total energies, `[100]` eV, indexed by atomic number.

    Least squares of energy = sum over atoms of reference[Z], with a weak pull of every reference to the
    mean energy per atom; so an element that is not in the data gets that mean, and elements that only
    occur together share their sum smoothly.
    """
    sample = data if isinstance(data, TargetSample) else sample_targets(data)
    per_atom = sample.energy.sum() / sample.composition.sum()
    residual = sample.energy - per_atom * sample.composition.sum(axis=1)
    normal = sample.composition.T @ sample.composition + _RIDGE * np.eye(NUM_ELEMENTS)
    return torch.from_numpy(per_atom + np.linalg.solve(normal, sample.composition.T @ residual))


def fit_normalizers(
    data: OC20Lmdb | TargetSample, linear_references: torch.Tensor | None = None
) -> NormalizerStatistics:
    """Mean and standard deviation of the energy (less the references), and rms of the forces.

    The mean force is 0, as in OC20. The public OC20 configurations take the energy's standard deviation
    for the forces too; here the forces have their own, the rms over the free atoms' components. A
    spread of zero (one record, or equal energies) becomes 1.
    """
    sample = data if isinstance(data, TargetSample) else sample_targets(data)
    energy = sample.energy
    if linear_references is not None:
        energy = energy - sample.composition @ linear_references.double().numpy()
    return {
        "energy": (float(energy.mean()), _positive(float(energy.std()))),
        "forces": (0.0, _positive(sample.forces_rms)),
    }


def _positive(spread: float | None) -> float:
    return spread if spread is not None and spread > 1e-6 else 1.0

"""Targets of a dataset: the kind of its energies, per-element references, mean and spread."""

import logging
import warnings
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from datasets_oc20.errors import DataError
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.target_sums import NUM_ELEMENTS, TargetSums, read_targets

_LOG = logging.getLogger(__name__)

# Means over a dataset that tell the kinds of energy apart. OC20's preprocessing keeps adsorption energies
# within 10 eV of 0 (Chanussot et al. 2021), and its public configurations give S2EF-2M -0.76 ± 2.89 eV: with
# 78 atoms on average, some 0.04 eV per atom. The per-element energies that fairchem publishes for OC20 totals
# are -0.2 eV (Cd) to -11.6 eV (W): hundreds of eV for a slab. Cells with several adsorbates may have
# adsorption energies above 10 eV, and yet far below 0.5 eV per atom.
_OC20_LARGEST, _LARGEST_ADSORPTION_MEAN = 10.0, 50.0
_BETWEEN_PER_ATOM = 0.5
# In units of the spread that the network is told to expect; OC20's filter leaves no target above 4.
_LARGEST_NORMALIZED_MEAN = 10.0
_SMALLEST_SPREAD = 1e-6


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


def sample_targets(dataset: OC20Lmdb, limit: int = 50_000, leave_out_unusable: bool = False) -> TargetSample:
    """Read the targets of at most `limit` records, evenly spaced over the dataset.

    Args:
        dataset: frames or systems with energies.
        limit: most records.
        leave_out_unusable: take the others where a record would raise; the sample may then be empty.

    Raises:
        DataError: a record cannot be read, has no energy, or an element above 99.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(np.int64))
    composition = np.zeros((len(indices), NUM_ELEMENTS))
    energy = np.zeros(len(indices))
    rows, squares, components = 0, 0.0, 0
    for index in indices.tolist():
        try:
            composition[rows], energy[rows], square, count = read_targets(dataset, index)
        except DataError:
            if not leave_out_unusable:
                raise
            continue
        rows, squares, components = rows + 1, squares + square, components + count
    rms = float(np.sqrt(squares / components)) if components else None
    return TargetSample(composition[:rows], energy[:rows], rms)


def check_energies_match_kind(sample: TargetSample, kind: str, name: str) -> None:
    """Raise `DataError` when the energies cannot be of the declared kind; warn when they are unlikely to be.

    Total energies may be as small as adsorption energies (EMT's are some 0.2 eV per atom), so they are taken
    as declared.
    """
    found = unlikely_size(sample, kind)
    if found is None:
        return
    if kind == "adsorption":
        raise DataError(
            f"{name}: declared as adsorption energies, but {found}, as of total energies (OC20's adsorption "
            "energies are below 10 eV); declare energy_kind total, or preprocess with the reference energies."
        )
    warnings.warn(
        f"{name}: taken as total energies, as declared, but {found}, as of adsorption energies (those of DFT "
        "are eV per atom, hundreds of eV for a slab); if they are adsorption energies, declare energy_kind "
        "adsorption.",
        stacklevel=2,
    )


def unlikely_size(sample: TargetSample, kind: str) -> str | None:
    """Half a sentence about the size of energies that are hardly of this kind; None where they may be."""
    mean = float(np.abs(sample.energy).mean())
    per_atom = float((np.abs(sample.energy) / sample.composition.sum(axis=1)).mean())
    if kind == "adsorption":
        unlikely = mean > _LARGEST_ADSORPTION_MEAN or (mean > _OC20_LARGEST and per_atom > _BETWEEN_PER_ATOM)
    else:
        unlikely = kind == "total" and mean < _OC20_LARGEST and per_atom < _BETWEEN_PER_ATOM
    return f"their mean size is {mean:.4g} eV ({per_atom:.2g} eV per atom)" if unlikely else None


def check_normalized_energies(
    sample: TargetSample, mean: float, std: float, linear_references: torch.Tensor | None, name: str
) -> None:
    """Raise `DataError` when normalizers that were not fitted to these energies leave them far from 0 ± 1.

    Args:
        sample: of the data to train on.
        mean, std: of the energy less the references, eV.
        linear_references: `[Z_max + 1]` eV, or None.
        name: of the data.
    """
    energy = sample.energy
    if linear_references is not None:
        used = np.zeros(NUM_ELEMENTS)
        known = linear_references.double().numpy()[:NUM_ELEMENTS]
        used[: len(known)] = known
        energy = energy - sample.composition @ used
    size = float(np.abs((energy - mean) / std).mean())
    if size > _LARGEST_NORMALIZED_MEAN:
        without = "without" if linear_references is None else "after"
        raise DataError(
            f"{name}: with the normalizers in use (mean {mean:.4g} eV, std {std:.4g} eV, {without} linear "
            f"references) energies are {size:.3g} standard deviations from the mean on average, so these are "
            "of other data; give data.normalizers of this data (`equiformer2 data references` prints those "
            "of "
            "total energies)."
        )


def fit_linear_references(data: OC20Lmdb | TargetSample) -> torch.Tensor:
    """Per-element references for total energies, `[100]` eV; see `TargetSums.references`."""
    sample = data if isinstance(data, TargetSample) else sample_targets(data)
    sums = TargetSums()
    sums.add(sample.composition, sample.energy)
    return torch.from_numpy(sums.references())


def fit_normalizers(
    data: OC20Lmdb | TargetSample, linear_references: torch.Tensor | None = None
) -> NormalizerStatistics:
    """Mean and standard deviation of the energy (less the references), and rms of the forces.

    The mean force is 0, as in OC20. The public OC20 configurations take the energy's standard deviation
    for the forces too; here the forces have their own, the rms over the free atoms' components. For a
    spread of zero see `known_spread`.
    """
    sample = data if isinstance(data, TargetSample) else sample_targets(data)
    energy = sample.energy
    if linear_references is not None:
        energy = energy - sample.composition @ linear_references.double().numpy()
    return {
        "energy": (float(energy.mean()), known_spread(float(energy.std()), "energies", "eV")),
        "forces": (0.0, known_spread(sample.forces_rms, "forces", "eV/Å")),
    }


def known_spread(spread: float | None, targets: str, unit: str) -> float:
    """`spread`, or 1 where it is None (no such targets), or zero, which the log says.

    Zero is below 1e-6: one record, equal energies, or as many elements as records after linear references.
    """
    if spread is not None and spread > _SMALLEST_SPREAD:
        return spread
    if spread is not None:
        _LOG.warning(
            "The %s of the training data have no spread (%.1e %s): 1 %s is used as their standard deviation; "
            "with one record, or the same value in all, nothing can be learned of them.",
            targets, spread, unit, unit,
        )  # fmt: skip
    return 1.0

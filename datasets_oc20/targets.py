"""Statistics of the targets of a dataset: kind of energies, per-element references, mean and spread."""

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

# Means over a dataset that separate the kinds of energy. OC20's preprocessing keeps adsorption energies
# within 10 eV of 0 (Chanussot et al. 2021), and its public configurations give S2EF-2M -0.76 ± 2.89 eV: with
# 78 atoms on average, some 0.04 eV per atom. The per-element energies that fairchem publishes for OC20 totals
# are -0.2 eV (Cd) to -11.6 eV (W): hundreds of eV for a slab. Cells with several adsorbates may have
# adsorption energies above 10 eV, and yet far below 0.5 eV per atom.
_OC20_LARGEST, _LARGEST_ADSORPTION_MEAN = 10.0, 50.0
_BETWEEN_PER_ATOM = 0.5
# In units of the standard deviation of the normalizer; OC20's filter leaves no target above 4.
_LARGEST_NORMALIZED_MEAN = 10.0
_SMALLEST_SPREAD = 1e-6


class NormalizerStatistics(TypedDict):
    """Mean and spread of the targets: (mean, std) of the energy in eV, (0, rms) of the forces in eV/Å."""

    energy: tuple[float, float]
    forces: tuple[float, float]


@dataclass(frozen=True)
class TargetSample:
    """Targets of a sample of a dataset.

    Attributes:
        composition: `[n, 100]` atoms per element (column = atomic number).
        energy: `[n]` eV.
        forces_rms: root mean square of a force component over the free atoms, eV/Å; None without forces.
    """

    composition: np.ndarray
    energy: np.ndarray
    forces_rms: float | None

    def unlikely_size(self, kind: str) -> str | None:
        """Describe the size of the energies if they are hardly of a kind.

        Args:
            kind: "adsorption" or "total".

        Returns:
            Half a sentence for a message; None where the energies may be of this kind.
        """
        mean = float(np.abs(self.energy).mean())
        per_atom = float((np.abs(self.energy) / self.composition.sum(axis=1)).mean())
        if kind == "adsorption":
            beyond_filter = mean > _OC20_LARGEST and per_atom > _BETWEEN_PER_ATOM
            unlikely = mean > _LARGEST_ADSORPTION_MEAN or beyond_filter
        else:
            unlikely = kind == "total" and mean < _OC20_LARGEST and per_atom < _BETWEEN_PER_ATOM
        return f"their mean size is {mean:.4g} eV ({per_atom:.2g} eV per atom)" if unlikely else None

    def check_normalized(
        self, mean: float, std: float, linear_references: torch.Tensor | None, name: str
    ) -> None:
        """Check that normalizers that were not fitted to these energies leave them near 0 ± 1.

        Args:
            mean: of the energy less the references, eV.
            std: standard deviation of the same, eV.
            linear_references: `[Z_max + 1]` eV, or None.
            name: names the data in the error.

        Raises:
            DataError: the energies are far from the mean.
        """
        energy = self.energy
        if linear_references is not None:
            padded = np.zeros(NUM_ELEMENTS)
            known = linear_references.double().numpy()[:NUM_ELEMENTS]
            padded[: len(known)] = known
            energy = energy - self.composition @ padded
        size = float(np.abs((energy - mean) / std).mean())
        if size > _LARGEST_NORMALIZED_MEAN:
            without = "without" if linear_references is None else "after"
            raise DataError(
                f"{name}: with the normalizers in use (mean {mean:.4g} eV, std {std:.4g} eV, {without} "
                f"linear references) energies are {size:.3g} standard deviations from the mean on average, "
                "so these are of other data; give data.normalizers of this data (`equiformer2 data "
                "references` prints those of total energies)."
            )


def sample_targets(dataset: OC20Lmdb, limit: int = 50_000, leave_out_unusable: bool = False) -> TargetSample:
    """Read the targets of at most `limit` records, evenly spaced over the dataset.

    Args:
        dataset: frames or systems with energies.
        limit: maximum number of records.
        leave_out_unusable: skip records that would raise; the sample may then be empty.

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
    """Check that energies can be of the declared kind, and warn when they are unlikely to be.

    Total energies may be as small as adsorption energies (EMT's are some 0.2 eV per atom), so they are taken
    as declared.

    Args:
        sample: of the dataset.
        kind: "adsorption" or "total".
        name: names the dataset in messages.

    Raises:
        DataError: energies declared as adsorption energies are as large as total energies.
    """
    size = sample.unlikely_size(kind)
    if size is None:
        return
    if kind == "adsorption":
        raise DataError(
            f"{name}: declared as adsorption energies, but {size}, as of total energies (OC20's adsorption "
            "energies are below 10 eV); declare energy_kind total, or preprocess with the reference energies."
        )
    warnings.warn(
        f"{name}: taken as total energies, as declared, but {size}, as of adsorption energies (those of DFT "
        "are eV per atom, hundreds of eV for a slab); if they are adsorption energies, declare energy_kind "
        "adsorption.",
        stacklevel=2,
    )


def fit_linear_references(data: OC20Lmdb | TargetSample) -> torch.Tensor:
    """Fit per-element references to total energies, `[100]` eV; see `TargetSums.references`."""
    sample = data if isinstance(data, TargetSample) else sample_targets(data)
    sums = TargetSums()
    sums.add(sample.composition, sample.energy)
    return torch.from_numpy(sums.references())


def fit_normalizers(
    data: OC20Lmdb | TargetSample, linear_references: torch.Tensor | None = None
) -> NormalizerStatistics:
    """Compute mean and standard deviation of the energy (less the references), and rms of the forces.

    The mean force is 0, as in OC20. The public OC20 configurations take the energy's standard deviation
    for the forces too; here the forces have their own, the rms over the free atoms' components. For a
    spread of zero see `known_spread`.

    Args:
        data: a dataset, of which a sample is read, or a sample.
        linear_references: `[100]` eV, or None.
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
    """Return `spread`, or 1 where it is None or below 1e-6, which is logged.

    A spread is that small with one record, equal energies, or, after linear references, as many elements as
    records.

    Args:
        spread: standard deviation; None without such targets.
        targets: name of the targets, for the log.
        unit: of the spread, for the log.
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

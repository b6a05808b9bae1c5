"""Per-element reference energies by least squares over any number of frames, in constant memory.

Everything is summed in float64, and energies less a first guess of the references: the spread of energies of
-6e6 eV is some eV, and the difference of two sums of their squares would leave no digit of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from tqdm import tqdm

from datasets_oc20.errors import DataError
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.workers import in_order

NUM_ELEMENTS = 100
# Weight of the pull to the mean energy per atom, in units of one structure with one such atom.
_RIDGE = 1e-3
# Frames that one process reads at a time. Fixed, so that the sums do not depend on the number of processes.
_CHUNK = 5000
# Of the element counts, each scaled to norm 1: a direction below this share of the largest is empty.
_EMPTY = 1e-10


@dataclass
class TargetSums:
    """Sums over frames from which references, mean and spread of their targets follow.

    The residual of a frame is its energy less its atoms' `guess`.

    Attributes:
        guess: `[100]` eV per atomic number. The results depend on it by rounding only.
        frames: how many.
        atoms: `[100]` atoms per element (index = atomic number).
        gram: `[100, 100]` sum of the products of element counts.
        moment: `[100]` sum of element counts times residual, eV.
        residual, residual_squares: sums of the residual (eV) and its square.
        force_squares, force_components: sum of the squared force components (eV²/Å²) of the free atoms, and
            their number.
    """

    guess: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ELEMENTS))
    frames: int = 0
    atoms: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ELEMENTS))
    gram: np.ndarray = field(default_factory=lambda: np.zeros((NUM_ELEMENTS, NUM_ELEMENTS)))
    moment: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ELEMENTS))
    residual: float = 0.0
    residual_squares: float = 0.0
    force_squares: float = 0.0
    force_components: int = 0

    def add(self, composition: np.ndarray, energy: np.ndarray) -> None:
        """Take in frames: atoms per element `[n, 100]` and energies `[n]` in eV."""
        residual = energy - composition @ self.guess
        self.frames += len(energy)
        self.atoms += composition.sum(axis=0)
        self.gram += composition.T @ composition
        self.moment += composition.T @ residual
        self.residual += float(residual.sum())
        self.residual_squares += float(residual @ residual)

    def merge(self, other: "TargetSums") -> None:
        """Take in the frames of `other`, which has the same guess."""
        for name, value in vars(other).items():
            if name != "guess":
                setattr(self, name, getattr(self, name) + value)

    def references(self) -> np.ndarray:
        """Energies `[100]` in eV per atomic number.

        Least squares of energy = sum over atoms of reference[Z], with a weak pull (ridge) of every reference
        to the mean energy per atom. So an element that is not in the data gets that mean, and elements whose
        counts depend linearly on each other (`undetermined`) share their sum evenly.
        """
        per_atom = (self.residual + self.atoms @ self.guess) / self.atoms.sum()
        pull = per_atom - self.guess
        ridge = _RIDGE * np.eye(NUM_ELEMENTS)
        return self.guess + np.linalg.solve(self.gram + ridge, self.moment + _RIDGE * pull)

    def undetermined(self) -> list[int]:
        """Elements in the data whose reference alone the data do not determine, only sums with others."""
        there = np.flatnonzero(self.atoms)
        scale = np.sqrt(np.diag(self.gram)[there])
        values, vectors = np.linalg.eigh(self.gram[np.ix_(there, there)] / np.outer(scale, scale))
        empty = vectors[:, values < _EMPTY * values.max()]
        return there[(np.abs(empty) > 1e-6).any(axis=1)].tolist()

    def energy_statistics(self, references: np.ndarray | None = None) -> tuple[float, float]:
        """Mean and standard deviation in eV of the energy less the references."""
        shift = (0.0 if references is None else references) - self.guess
        mean = (self.residual - self.atoms @ shift) / self.frames
        # Of the deviations from the means: counts of atoms are whole numbers, whose products are exact.
        gram = self.gram - np.outer(self.atoms, self.atoms) / self.frames
        moment = self.moment - self.atoms * (self.residual / self.frames)
        squares = self.residual_squares - self.residual**2 / self.frames
        variance = (squares - 2 * moment @ shift + shift @ gram @ shift) / self.frames
        return float(mean), float(np.sqrt(max(variance, 0.0)))

    @property
    def forces_rms(self) -> float | None:
        """Root mean square of a force component of the free atoms in eV/Å; None without forces."""
        return float(np.sqrt(self.force_squares / self.force_components)) if self.force_components else None


def sum_targets(
    dataset: OC20Lmdb,
    num_workers: int | None = None,
    progress: bool = False,
    guess: np.ndarray | None = None,
) -> TargetSums:
    """The sums over all frames of a dataset; only one chunk of frames per process is held in memory.

    Args:
        dataset: frames with energies.
        num_workers: processes; None takes one per core.
        progress: show a bar on a terminal.
        guess: see `TargetSums`; zeros by default.

    Raises:
        DataError: a record has no energy, or an element above 99.
    """
    chunks = [range(first, min(first + _CHUNK, len(dataset))) for first in range(0, len(dataset), _CHUNK)]
    total = TargetSums() if guess is None else TargetSums(guess)
    with (
        tqdm(total=len(dataset), desc=dataset.path, unit="frames", disable=None if progress else True) as bar,
        in_order(partial(_sum_chunk, dataset, total.guess), chunks, num_workers) as parts,
    ):
        for part in parts:
            total.merge(part)
            bar.update(part.frames)
    return total


def _sum_chunk(dataset: OC20Lmdb, guess: np.ndarray, indices: Sequence[int]) -> TargetSums:
    sums = TargetSums(guess)
    composition, energy = np.zeros((len(indices), NUM_ELEMENTS)), np.zeros(len(indices))
    for row, index in enumerate(indices):
        composition[row], energy[row], squares, components = read_targets(dataset, index)
        sums.force_squares += squares
        sums.force_components += components
    sums.add(composition, energy)
    return sums


def read_targets(dataset: OC20Lmdb, index: int) -> tuple[np.ndarray, float, float, int]:
    """Of one record: atoms per element `[100]`, energy (eV), squares (eV²/Å²) and number of force components.

    The last two of free atoms; 0 without forces.

    Raises:
        DataError: as `sum_targets`.
    """
    data = dataset[index]
    if "energy" not in data:
        raise DataError(f"{dataset.describe(index)}: the record has no energy to train on.")
    if int(data.atomic_numbers.max()) >= NUM_ELEMENTS:
        raise DataError(f"{dataset.describe(index)}: an element above 99 has no reference energy.")
    counts = np.bincount(data.atomic_numbers.numpy(), minlength=NUM_ELEMENTS).astype(np.float64)
    if "forces" not in data:
        return counts, data.energy.item(), 0.0, 0
    free = data.forces[~data.fixed].double()
    return counts, data.energy.item(), float((free * free).sum()), free.numel()

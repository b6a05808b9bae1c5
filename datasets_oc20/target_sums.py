"""Per-element reference energies by least squares over any number of frames, in constant memory.

All sums are float64, and energies are summed less a first guess of the references: the spread of energies of
-6e6 eV is some eV, and would be lost in the difference of two sums of their squares.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from tqdm import tqdm

from datasets_oc20.errors import DataError
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.workers import parallel_map

NUM_ELEMENTS = 100
# Weight of the pull to the references of the step before, in units of one structure with one such atom. Of
# what is left to a step, the share ridge / (ridge + its weight in the data) is left to the next.
_RIDGE, _STEPS = 1e-3, 20
CHUNK_FRAMES = 5000
"""Frames that one process reads at a time. Fixed, so that sums do not depend on the number of processes."""
# Of the element counts, each scaled to norm 1: a direction below this share of the largest is empty.
_EMPTY = 1e-10


@dataclass
class TargetSums:
    """Sums over frames from which references, mean and spread of their targets follow.

    The residual of a frame is its energy less its atoms' `guess`.

    Attributes:
        guess: `[100]` eV per atomic number. The results depend on it by rounding only.
        frames: number of frames.
        atoms: `[100]` atoms per element (index = atomic number).
        gram: `[100, 100]` sum of the products of element counts.
        moment: `[100]` sum of element counts times residual, eV.
        residual: sum of the residual, eV.
        residual_squares: sum of its square, eV².
        force_squares: sum of the squared force components of the free atoms, eV²/Å².
        force_components: number of these components.
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

    @classmethod
    def of_frames(cls, dataset: OC20Lmdb, guess: np.ndarray, indices: Sequence[int]) -> "TargetSums":
        """Sum over the frames `indices` of a dataset; errors as `read_targets`."""
        sums = cls(guess)
        composition, energy = np.zeros((len(indices), NUM_ELEMENTS)), np.zeros(len(indices))
        for row, index in enumerate(indices):
            composition[row], energy[row], squares, components = read_targets(dataset, index)
            sums.force_squares += squares
            sums.force_components += components
        sums.add(composition, energy)
        return sums

    def add(self, composition: np.ndarray, energy: np.ndarray) -> None:
        """Add frames.

        Args:
            composition: `[n, 100]` atoms per element (column = atomic number).
            energy: `[n]` eV.
        """
        residual = energy - composition @ self.guess
        self.frames += len(energy)
        self.atoms += composition.sum(axis=0)
        self.gram += composition.T @ composition
        self.moment += composition.T @ residual
        self.residual += float(residual.sum())
        self.residual_squares += float(residual @ residual)

    def merge(self, other: "TargetSums") -> None:
        """Add the frames of `other`, which has the same guess."""
        for name, value in vars(other).items():
            if name != "guess":
                setattr(self, name, getattr(self, name) + value)

    def references(self) -> np.ndarray:
        """Fit the reference energies, `[100]` eV per atomic number.

        Least squares of energy = sum over atoms of reference[Z], of all solutions the one nearest to the mean
        energy per atom for every element. So an element that is not in the data gets that mean, and elements
        whose counts depend linearly on each other (`undetermined`) share their sum evenly.

        The pull to the mean is a ridge that is repeated, each time to the references found so far: a single
        one would move references by eV where energies per atom differ by thousands of eV, as those of codes
        that count core electrons do.
        """
        per_atom = (self.residual + self.atoms @ self.guess) / self.atoms.sum()
        shift = per_atom - self.guess
        inverse = np.linalg.inv(self.gram + _RIDGE * np.eye(NUM_ELEMENTS))
        for _ in range(_STEPS):
            shift = shift + inverse @ (self.moment - self.gram @ shift)
        return self.guess + shift

    def undetermined(self) -> list[int]:
        """Return the elements for whose references the data determine only sums with others."""
        present = np.flatnonzero(self.atoms)
        scale = np.sqrt(np.diag(self.gram)[present])
        values, vectors = np.linalg.eigh(self.gram[np.ix_(present, present)] / np.outer(scale, scale))
        empty = vectors[:, values < _EMPTY * values.max()]
        return present[(np.abs(empty) > 1e-6).any(axis=1)].tolist()

    def energy_statistics(self, references: np.ndarray | None = None) -> tuple[float, float]:
        """Return mean and standard deviation, eV, of the energy less `references`, `[100]` eV or None."""
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
    chunk_frames: int = CHUNK_FRAMES,
) -> TargetSums:
    """Sum over all frames of a dataset; only one chunk of frames per process is held in memory.

    Args:
        dataset: frames with energies.
        num_workers: number of processes; None takes one per core.
        progress: show a bar on a terminal.
        guess: `[100]` eV, see `TargetSums`; zeros by default.
        chunk_frames: frames that one process reads at a time.

    Raises:
        DataError: a record has no energy, or an element above 99.
    """
    starts = range(0, len(dataset), chunk_frames)
    chunks = [range(first, min(first + chunk_frames, len(dataset))) for first in starts]
    total = TargetSums() if guess is None else TargetSums(guess)
    with (
        tqdm(total=len(dataset), desc=dataset.path, unit="frames", disable=None if progress else True) as bar,
        parallel_map(partial(TargetSums.of_frames, dataset, total.guess), chunks, num_workers) as parts,
    ):
        for part in parts:
            total.merge(part)
            bar.update(part.frames)
    return total


def read_targets(dataset: OC20Lmdb, index: int) -> tuple[np.ndarray, float, float, int]:
    """Read the targets of one record.

    Args:
        dataset: frames with energies.
        index: of the record.

    Returns:
        Atoms per element `[100]`, energy (eV), and of the force components of free atoms the sum of squares
        (eV²/Å²) and the number; 0 without forces.

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

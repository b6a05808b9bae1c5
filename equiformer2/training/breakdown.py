"""Errors of a model by adsorbate and by element."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from torch import Tensor
from torch_geometric.data import Batch

from datasets_oc20.raw_release import adsorbate_of
from equiformer2.checkpoint.training_data import adsorbate_formula
from equiformer2.training.metrics import ENERGY_THRESHOLD

ADSORBATE = 2
#: Sums of one row: structures, |energy error| eV, structures within 0.02 eV, free atoms, |force error| over
#: components eV/Å, and the same for free adsorbate atoms.
SUMS = (
    "structures",
    "energy_abs",
    "energy_solved",
    "free_atoms",
    "forces_abs",
    "adsorbate_atoms",
    "adsorbate_forces_abs",
)
Sums = dict[str, np.ndarray]
Rows = dict[str, dict[str, Any]]


class Breakdown:
    """Accumulates errors over batches.

    Args:
        adsorbates: sums per name to go on with, see `SUMS`.
        elements: the same.
        names: adsorbate by `sid`; a system without one goes by `adsorbate_formula`.
    """

    def __init__(
        self,
        adsorbates: Mapping[str, Any] | None = None,
        elements: Mapping[str, Any] | None = None,
        names: dict[str, str] | None = None,
    ) -> None:
        self._names = names or {}
        self.adsorbates: Sums = {name: np.asarray(row, float) for name, row in (adsorbates or {}).items()}
        self.elements: Sums = {name: np.asarray(row, float) for name, row in (elements or {}).items()}

    def update(self, prediction: Mapping[str, Tensor], batch: Batch) -> None:
        """Add one batch; `prediction` as `Predictor.predict` gives it, targets in `batch`."""
        natoms = batch.natoms.view(-1).numpy()
        structure = np.repeat(np.arange(len(natoms)), natoms)
        numbers, tags = batch.atomic_numbers.numpy(), batch.tags.numpy()
        error = (prediction["energy"].view(-1).double() - batch.energy.view(-1).double()).abs().numpy()
        per_structure = np.stack([np.ones_like(error), error, error < ENERGY_THRESHOLD], axis=1)
        per_atom = np.zeros((len(numbers), 4))
        if "forces" in prediction:
            free = ~batch.fixed.bool().numpy()
            size = (prediction["forces"] - batch.forces).abs().double().sum(dim=1).numpy()
            held = free & (tags == ADSORBATE)
            per_atom = np.stack([free, free * size, held, held * size], axis=1)
        atoms = np.zeros((len(natoms), 4))
        np.add.at(atoms, structure, per_atom)
        starts = np.cumsum(natoms) - natoms
        for row, (start, count) in enumerate(zip(starts, natoms, strict=True)):
            part = slice(start, start + count)
            given = adsorbate_of(str(batch.sid[row]), self._names) if self._names else None
            name = given or adsorbate_formula(numbers[part], tags[part])
            self._add(self.adsorbates, name, np.concatenate([per_structure[row], atoms[row]]))
        for number in np.unique(numbers):
            mine = numbers == number
            with_it = np.unique(structure[mine])
            values = np.concatenate([per_structure[with_it].sum(axis=0), per_atom[mine].sum(axis=0)])
            self._add(self.elements, chemical_symbols[number], values)

    def merge(self, other: "Breakdown") -> None:
        """Add the sums of another breakdown."""
        for mine, theirs in ((self.adsorbates, other.adsorbates), (self.elements, other.elements)):
            for name, values in theirs.items():
                self._add(mine, name, values)

    def adsorbate_rows(self) -> Rows:
        """Errors by adsorbate, the most frequent first.

        `structures`, `energy_mae` eV, `energy_within_threshold`; where there are forces `free_atoms`,
        `forces_mae` eV/Å over all free atoms of these structures, and `adsorbate_forces_mae` over those of
        the adsorbate alone.
        """
        order = sorted(self.adsorbates, key=lambda name: (-self.adsorbates[name][0], name))
        return {name: self._row(self.adsorbates[name], adsorbate=True) for name in order}

    def element_rows(self) -> Rows:
        """Errors by element in the order of the periodic table.

        `structures` with the element, their `energy_mae` eV and `energy_within_threshold`; where there are
        forces `free_atoms` of the element and their `forces_mae` eV/Å.
        """
        order = sorted(self.elements, key=chemical_symbols.index)
        return {name: self._row(self.elements[name], adsorbate=False) for name in order}

    def state(self) -> dict[str, dict[str, list[float]]]:
        """The sums as plain values; `Breakdown(**state)` goes on with them."""
        return {
            "adsorbates": {name: row.tolist() for name, row in self.adsorbates.items()},
            "elements": {name: row.tolist() for name, row in self.elements.items()},
        }

    @staticmethod
    def _add(sums: Sums, name: str, values: np.ndarray) -> None:
        sums[name] = sums[name] + values if name in sums else values

    @staticmethod
    def _row(values: np.ndarray, adsorbate: bool) -> dict[str, Any]:
        """Means of one row of sums, in the units of `SUMS`."""
        sums = dict(zip(SUMS, values.tolist(), strict=True))
        row: dict[str, Any] = {
            "structures": int(sums["structures"]),
            "energy_mae": sums["energy_abs"] / sums["structures"],
            "energy_within_threshold": sums["energy_solved"] / sums["structures"],
        }
        if sums["free_atoms"]:
            row["free_atoms"] = int(sums["free_atoms"])
            row["forces_mae"] = sums["forces_abs"] / (3 * sums["free_atoms"])
        if adsorbate and sums["adsorbate_atoms"]:
            row["adsorbate_forces_mae"] = sums["adsorbate_forces_abs"] / (3 * sums["adsorbate_atoms"])
        return row

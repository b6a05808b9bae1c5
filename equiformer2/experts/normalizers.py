"""Conversion between normalised units and eV where every structure has a task with units of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equiformer2.checkpoint.normalizers import Normalizers
from equiformer2.errors import InputError
from equiformer2.model.config import ModelConfig


class TaskNormalizers:
    """Normalizers of several tasks, with the methods of `Normalizers` for batches with `task [B]`.

    Energies have a mean, a spread and references per task. Forces have one spread: what a force is does not
    depend on the zero of an energy, and one head gives those of all tasks.

    Args:
        tasks: normalizers by name, in the order of the numbers of the tasks.

    Raises:
        InputError: the spreads of the forces differ, or some tables of references differ in length.
    """

    def __init__(self, tasks: Mapping[str, Normalizers]) -> None:
        self.tasks = dict(tasks)
        listed = list(self.tasks.values())
        if len({each.forces.std for each in listed}) != 1:
            raise InputError("the tasks of an expert network need one std of the forces")
        self.forces = listed[0].forces
        self._mean, self._std = (
            torch.tensor([getattr(each.energy, name) for each in listed], dtype=torch.float64)
            for name in ("mean", "std")
        )
        tables = [each.linear_references for each in listed]
        length = max((len(table) for table in tables if table is not None), default=0)
        self._references: Tensor | None = None
        if length:
            self._references = torch.zeros(len(tables), length, dtype=torch.float64)
            for row, table in zip(self._references, tables, strict=True):
                if table is not None:
                    row[: len(table)] = table
            if any(table is not None and len(table) < length for table in tables):
                raise InputError("the references of the tasks of an expert network must have one length")

    def energy_std(self, batch: Any) -> Tensor:
        """Return the spread of the energies of every structure, `[B]` float64 eV."""
        return self._of(self._std, batch)

    def denormalize(self, out: Mapping[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Convert the network's output to eV, eV/Å and eV/Å^3; see `Normalizers.denormalize`."""
        physical = {}
        if "energy" in out:
            energy = out["energy"].double() * self.energy_std(batch) + self._of(self._mean, batch)
            physical["energy"] = energy + self._reference_energy(batch)
        if "forces" in out:
            physical["forces"] = self.forces.denormalize(out["forces"])
        if "stress" in out:
            stress = out["stress"] if out["stress"].dtype == torch.float64 else out["stress"].float()
            physical["stress"] = stress * self.energy_std(batch).to(stress.dtype)[:, None, None]
        return physical

    def normalize_energy(self, energy: Tensor, batch: Any) -> Tensor:
        """Convert energies `[B]` in eV to the network's units, `[B]` float64."""
        rest = energy.double() - self._reference_energy(batch) - self._of(self._mean, batch)
        return rest / self.energy_std(batch)

    def normalize_forces(self, forces: Tensor) -> Tensor:
        """Convert forces `[N, 3]` in eV/Å to the network's units, `[N, 3]`."""
        return self.forces.normalize(forces)

    def check_model(self, config: ModelConfig, source: str) -> None:
        """Check that gradient forces are those of the energy; see `Normalizers.check_model`."""
        for name, each in self.tasks.items():
            each.check_model(config, f"{source}: task {name}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values and tensors, for a checkpoint."""
        return {name: each.to_dict() for name, each in self.tasks.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TaskNormalizers":
        """Build the normalizers from the result of `to_dict`.

        Raises:
            InputError: as `Normalizers.from_dict`.
        """
        return cls({name: Normalizers.from_dict(each) for name, each in values.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaskNormalizers):
            return NotImplemented
        return list(self.tasks) == list(other.tasks) and self.tasks == other.tasks

    __hash__ = None  # type: ignore[assignment]

    @staticmethod
    def _of(values: Tensor, batch: Any) -> Tensor:
        """Look up one value of `[T]` per structure, `[B]`."""
        return values.to(batch.task.device)[batch.task.reshape(-1)]

    def _reference_energy(self, batch: Any) -> Tensor:
        """Sum the references of every structure's task over its atoms, `[B]` float64 eV."""
        numbers, task = batch.atomic_numbers, batch.task.reshape(-1)
        total = torch.zeros(len(task), dtype=torch.float64, device=numbers.device)
        if self._references is None:
            return total
        if numbers.numel() and int(numbers.max()) >= self._references.shape[1]:
            raise InputError(
                f"atomic number {int(numbers.max())} has no linear reference: the tables end at "
                f"{self._references.shape[1] - 1}"
            )
        structure = batch.batch
        return total.index_add(0, structure, self._references.to(numbers.device)[task[structure], numbers])

"""Several datasets as one: labels of another method beside one's own, and tasks that are trained together."""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_geometric.data import Data

from datasets_oc20.errors import DataError
from datasets_oc20.reader import OC20Lmdb

Paths = str | list[str]
MOST_REPEATS = 10_000


class MixedLabelDataset(Dataset):
    """Concatenation of labelled and forces-only records, each with a field `has_energy [1]` (bool).

    Forces of another method (a universal potential, say) can be learned beside DFT labels; its energies
    cannot, because they have another zero. So the energies of `forces_only` are kept, but marked.

    Args:
        labelled: records whose energies and forces are learned; they come first.
        forces_only: records of which only the forces are learned.

    Raises:
        DataError: one of the two has no forces.
    """

    def __init__(self, labelled: OC20Lmdb, forces_only: OC20Lmdb) -> None:
        self.labelled, self.forces_only = labelled, forces_only
        for dataset in (labelled, forces_only):
            if "forces" not in dataset[0]:
                raise DataError(
                    f"{dataset.describe(0)}: no forces; data.forces_only needs them in both sets."
                )

    def __len__(self) -> int:
        """Return the number of structures."""
        return len(self.labelled) + len(self.forces_only)

    def __getitem__(self, index: int) -> Data:
        """Read the structure `index`."""
        extra = index - len(self.labelled)
        data = self.labelled[index] if extra < 0 else self.forces_only[extra]
        data.has_energy = torch.tensor([extra < 0])
        return data

    @property
    def natoms(self) -> np.ndarray:
        """Number of atoms of every structure, `[len]`."""
        return np.concatenate([self.labelled.natoms, self.forces_only.natoms])


@dataclass(frozen=True)
class TaskData:
    """Data of one of several tasks that are trained together.

    Args:
        train: as `OC20DataModule`'s.
        val: likewise; None holds systems out of `train`.
        energy_kind: likewise.
        repeat: times that every training structure is used in an epoch, for a small set beside a large one.

    Raises:
        DataError: a value is of the wrong kind or out of its range.
    """

    train: Paths
    val: Paths | None = None
    energy_kind: str | None = None
    repeat: int = 1

    @classmethod
    def read(cls, values: Any, name: str) -> "TaskData":
        """Check the values of one task in a configuration.

        Args:
            values: by key.
            name: of the task, for errors.

        Raises:
            DataError: a key is unknown or missing, or a value is of the wrong kind.
        """
        where, known = f"data.tasks.{name}", list(cls.__dataclass_fields__)
        if not isinstance(values, Mapping):
            raise DataError(f"{where}: must hold the keys {', '.join(known)}, of which train is needed.")
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise DataError(f"{where}: unknown key '{unknown[0]}'; the keys are {', '.join(known)}.")
        if values.get("train") is None:
            raise DataError(f"{where}.train is not set; name the data to train on.")
        for key in ("train", "val"):
            value = values.get(key)
            texts = value if isinstance(value, list) else [value]
            if value is not None and not (texts and all(isinstance(text, str) and text for text in texts)):
                raise DataError(f"{where}.{key} must be a path or a list of paths.")
        kind, repeat = values.get("energy_kind"), values.get("repeat", 1)
        if kind not in (None, "adsorption", "total"):
            raise DataError(f"{where}.energy_kind is '{kind}'; it is adsorption or total.")
        if isinstance(repeat, bool) or not isinstance(repeat, int) or not 1 <= repeat <= MOST_REPEATS:
            raise DataError(f"{where}.repeat must be a whole number of 1 to {MOST_REPEATS}, not {repeat}.")
        return cls(**values)


class TaskDataset(Dataset):
    """Concatenation of the data of several tasks, each structure with the number of its task, `task [1]`.

    Args:
        parts: dataset by the name of the task.
        repeats: times that each of them is listed; None for once.
    """

    def __init__(self, parts: Mapping[str, OC20Lmdb], repeats: Mapping[str, int] | None = None) -> None:
        self.parts = dict(parts)
        self.repeats = {name: 1 if repeats is None else repeats[name] for name in parts}
        self.path = ", ".join(part.path for part in parts.values())
        self._listed = list(parts.values())
        self._ends = list(accumulate(len(part) * self.repeats[name] for name, part in parts.items()))

    def __len__(self) -> int:
        """Return the number of structures, those of repeated tasks as often as they are used."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Data:
        """Read the structure `index`."""
        task, row = self._locate(index)
        data = self._listed[task][row]
        data.task = torch.tensor([task])
        return data

    @property
    def natoms(self) -> np.ndarray:
        """Number of atoms of every structure, `[len]`."""
        return np.concatenate([np.tile(part.natoms, self.repeats[name]) for name, part in self.parts.items()])

    @property
    def labels(self) -> list[str]:
        """Statements of the files about their labels, sorted."""
        return sorted({statement for part in self._listed for statement in part.labels})

    def fields(self, index: int) -> frozenset[str]:
        """Return the names of the arrays of structure `index`."""
        task, row = self._locate(index)
        return self._listed[task].fields(row)

    def describe(self, index: int) -> str:
        """Name file and key of structure `index`, for messages."""
        task, row = self._locate(index)
        return self._listed[task].describe(row)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: index {index} of {len(self)} records")
        task = bisect.bisect_right(self._ends, index)
        return task, (index - (self._ends[task - 1] if task else 0)) % len(self._listed[task])

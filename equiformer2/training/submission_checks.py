"""Check files for the OC20 leaderboard, whichever program made them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets_oc20 import OC20Lmdb
from datasets_oc20.untrusted import AnyPath
from equiformer2.training.submission import FIELDS, SPLITS, Arrays, read_arrays

# OC20 keeps |adsorption energy| <= 10 eV; total energies of its slabs are hundreds of eV.
_LARGEST_MEAN_ENERGY = 50.0


def task_of(arrays: Arrays) -> str:
    """Tell the task of a file from its keys: `s2ef` where there are forces, else `is2re`."""
    return "s2ef" if any(key.endswith(("_forces", "_chunk_idx")) for key in arrays) else "is2re"


def submission_problems(path: AnyPath, task: str | None = None) -> list[str]:
    """List what is wrong with a file, one sentence with the key each; empty when it can be submitted.

    Args:
        path: `.npz` file.
        task: "s2ef", "is2re", or None to tell it from the keys.

    Raises:
        InputError: not a `.npz` file, or arrays that cannot be read without running code.
        OSError: missing or unreadable.
    """
    path = Path(path)
    arrays = read_arrays(path)
    fields = FIELDS[task or task_of(arrays)]
    wanted = [f"{split}_{field}" for split in SPLITS for field in fields]
    problems = [f"key {key} is missing" for key in wanted if key not in arrays]
    unknown = sorted(set(arrays) - set(wanted))
    problems += [f"key {key} is not a key of {task or task_of(arrays)}: leave it out" for key in unknown]
    for split in SPLITS:
        problems += _Split(arrays, split).problems(fields)
    return problems


def problems_beside_data(path: AnyPath, data: Mapping[str, Path]) -> list[str]:
    """List the differences between a file and the structures of the test sets.

    Ids are compared, and for S2EF the number of forces of every structure, which may be that of its free
    atoms or of all atoms, the same for all.

    Args:
        path: a file without `submission_problems`.
        data: split of `SPLITS` to its dataset.
    """
    path = Path(path)
    arrays = read_arrays(path)
    task = task_of(arrays)
    problems = []
    for split, where in data.items():
        dataset = OC20Lmdb(where)
        expected: dict[str, tuple[int, int]] = {}
        for index in tqdm(range(len(dataset)), desc=str(dataset.path), disable=None, leave=False):
            record = dataset[index]
            name = f"{record.sid}_{record.fid}" if task == "s2ef" else str(record.sid)
            expected[name] = (int((~record.fixed.bool()).sum()), int(record.natoms))
        ids = [str(name) for name in arrays[f"{split}_ids"]]
        lacking, other = expected.keys() - set(ids), set(ids) - expected.keys()
        if lacking:
            problems.append(f"key {split}_ids lacks {len(lacking)} ids of the data, such as {min(lacking)}")
        if other:
            problems.append(f"key {split}_ids has {len(other)} ids not of the data, such as {min(other)}")
        if task == "s2ef" and not lacking and not other:
            ends = [0, *arrays[f"{split}_chunk_idx"].tolist(), len(arrays[f"{split}_forces"])]
            counts = np.diff(ends)
            wanted = np.array([expected[name] for name in ids])
            if not any(np.array_equal(counts, wanted[:, column]) for column in (0, 1)):
                first = int(np.flatnonzero(counts != wanted[:, 0])[0])
                problems.append(
                    f"key {split}_chunk_idx gives structure {ids[first]} {counts[first]} forces, but it has "
                    f"{wanted[first, 0]} free atoms of {wanted[first, 1]}"
                )
    return problems


class _Split:
    """Checks of the keys of one split.

    Each check returns ends of sentences that begin with "key {split}_{field}".

    Args:
        arrays: arrays of the file, by key.
        split: one of `SPLITS`.
    """

    def __init__(self, arrays: Arrays, split: str) -> None:
        self.split = split
        self.arrays = {
            key.removeprefix(f"{split}_"): array
            for key, array in arrays.items()
            if key.startswith(f"{split}_")
        }
        ids = self.arrays.get("ids")
        self.count = len(ids) if ids is not None and ids.ndim == 1 else None

    def problems(self, fields: tuple[str, ...]) -> list[str]:
        """List what is wrong with the fields that are there, one sentence each."""
        checks = {
            "ids": self._check_ids,
            "energy": self._check_energy,
            "forces": self._check_forces,
            "chunk_idx": self._check_chunk_idx,
        }
        problems = [
            f"key {self.split}_{field} {problem}"
            for field in fields
            if field in self.arrays
            for problem in checks[field](self.arrays[field])
        ]
        forces, chunks = self.arrays.get("forces"), self.arrays.get("chunk_idx")
        if not problems and forces is not None and chunks is not None and chunks.size:
            last = int(chunks[-1])
            if last > len(forces):
                problems.append(
                    f"key {self.split}_chunk_idx ends at {last}, but {self.split}_forces has "
                    f"{len(forces)} rows"
                )
        return problems

    def _check_ids(self, ids: np.ndarray) -> list[str]:
        if ids.ndim != 1:
            return [f"has the shape {list(ids.shape)}, not [n]"]
        if ids.dtype.kind not in "Uiu":
            return [f"is {ids.dtype}: save ids as text"]
        if not ids.size:
            return ["is empty"]
        values, counts = np.unique(ids, return_counts=True)
        twice = values[counts > 1]
        return [f"has {len(twice)} ids more than once, such as {twice[0]}"] if twice.size else []

    def _check_energy(self, energy: np.ndarray) -> list[str]:
        problems = self._check_numbers(energy, "n")
        if problems:
            return problems
        if self.count is not None and len(energy) != self.count:
            problems.append(f"has {len(energy)} energies for {self.count} ids")
        mean = float(np.abs(energy.astype(np.float64)).mean()) if energy.size else 0.0
        if mean > _LARGEST_MEAN_ENERGY:
            problems.append(
                f"has a mean size of {mean:.0f} eV, as of total energies: give adsorption energies"
            )
        return problems

    def _check_forces(self, forces: np.ndarray) -> list[str]:
        return self._check_numbers(forces, "m, 3")

    @staticmethod
    def _check_numbers(array: np.ndarray, shape: str) -> list[str]:
        dimensions = shape.count(",") + 1
        if array.ndim != dimensions or (dimensions == 2 and array.shape[1] != 3):
            return [f"has the shape {list(array.shape)}, not [{shape}]"]
        if array.dtype.kind != "f":
            return [f"is {array.dtype}, not floating-point numbers"]
        bad = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
        return [f"has {len(bad)} values that are not finite, the first in row {bad[0]}"] if bad.size else []

    def _check_chunk_idx(self, chunks: np.ndarray) -> list[str]:
        if chunks.ndim != 1:
            return [f"has the shape {list(chunks.shape)}, not [n - 1]"]
        if chunks.dtype.kind not in "iu":
            return [f"is {chunks.dtype}, not whole numbers"]
        if self.count is not None and len(chunks) == self.count:
            return ["has as many entries as there are ids: leave out the last, np.split does not need it"]
        if self.count is not None and len(chunks) != self.count - 1:
            return [f"has {len(chunks)} entries for {self.count} ids, not {self.count - 1}"]
        if chunks.size and (chunks[0] < 0 or (np.diff(chunks.astype(np.int64)) < 0).any()):
            return ["does not rise: it holds where forces begin, the cumulative sum of the numbers of atoms"]
        return []

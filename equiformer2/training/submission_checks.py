"""Is a file what the OC20 leaderboard takes? For any such file, whoever made it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets_oc20 import OC20Lmdb
from datasets_oc20.untrusted import AnyPath
from equiformer2.training.submission import FIELDS, SPLITS, Arrays, read_arrays

# OC20 keeps |adsorption energy| <= 10 eV; total energies of its slabs are hundreds of eV.
_LARGEST_MEAN_ENERGY = 50.0


def task_of(arrays: Arrays) -> str:
    """The task of a file: S2EF where there are forces, else IS2RE."""
    return "s2ef" if any(key.endswith(("_forces", "_chunk_idx")) for key in arrays) else "is2re"


def submission_problems(path: AnyPath, task: str | None = None) -> list[str]:
    """What is wrong with a file, one sentence each, all with the key; empty when it can be submitted.

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
        problems += _problems_of_split(arrays, split, fields)
    return problems


def _problems_of_split(arrays: Arrays, split: str, fields: tuple[str, ...]) -> list[str]:
    ids = arrays.get(f"{split}_ids")
    listed = ids if ids is not None and ids.ndim == 1 else None
    problems = [
        f"key {split}_{field} {problem}"
        for field in fields
        if f"{split}_{field}" in arrays
        for problem in _CHECKS[field](arrays[f"{split}_{field}"], ids if field == "ids" else listed)
    ]
    forces, chunks = arrays.get(f"{split}_forces"), arrays.get(f"{split}_chunk_idx")
    if not problems and forces is not None and chunks is not None and chunks.size:
        last = int(chunks[-1])
        if last > len(forces):
            problems.append(
                f"key {split}_chunk_idx ends at {last}, but {split}_forces has {len(forces)} rows"
            )
    return problems


def problems_beside_data(path: AnyPath, data: Mapping[str, Path]) -> list[str]:
    """What a file lacks or has too much beside the structures of the test sets.

    Compares ids, and for S2EF the number of forces of every structure, which may be that of its free
    atoms or of all atoms, but the same for all.

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


def _ids(ids: np.ndarray, _: np.ndarray | None) -> list[str]:
    if ids.ndim != 1:
        return [f"has the shape {list(ids.shape)}, not [n]"]
    if ids.dtype.kind not in "Uiu":
        return [f"is {ids.dtype}: save ids as text"]
    if not ids.size:
        return ["is empty"]
    values, counts = np.unique(ids, return_counts=True)
    twice = values[counts > 1]
    return [f"has {len(twice)} ids more than once, such as {twice[0]}"] if twice.size else []


def _energy(energy: np.ndarray, ids: np.ndarray | None) -> list[str]:
    problems = _numbers(energy, "n")
    if problems:
        return problems
    if ids is not None and len(energy) != len(ids):
        problems.append(f"has {len(energy)} energies for {len(ids)} ids")
    mean = float(np.abs(energy.astype(np.float64)).mean()) if energy.size else 0.0
    if mean > _LARGEST_MEAN_ENERGY:
        problems.append(f"has a mean size of {mean:.0f} eV, as of total energies: give adsorption energies")
    return problems


def _forces(forces: np.ndarray, _: np.ndarray | None) -> list[str]:
    return _numbers(forces, "m, 3")


def _numbers(array: np.ndarray, shape: str) -> list[str]:
    dimensions = shape.count(",") + 1
    if array.ndim != dimensions or (dimensions == 2 and array.shape[1] != 3):
        return [f"has the shape {list(array.shape)}, not [{shape}]"]
    if array.dtype.kind != "f":
        return [f"is {array.dtype}, not floating-point numbers"]
    bad = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
    return [f"has {len(bad)} values that are not finite, the first in row {bad[0]}"] if bad.size else []


def _chunk_idx(chunks: np.ndarray, ids: np.ndarray | None) -> list[str]:
    if chunks.ndim != 1:
        return [f"has the shape {list(chunks.shape)}, not [n - 1]"]
    if chunks.dtype.kind not in "iu":
        return [f"is {chunks.dtype}, not whole numbers"]
    if ids is not None and len(chunks) == len(ids):
        return ["has as many entries as there are ids: leave out the last, np.split does not need it"]
    if ids is not None and len(chunks) != len(ids) - 1:
        return [f"has {len(chunks)} entries for {len(ids)} ids, not {len(ids) - 1}"]
    if chunks.size and (chunks[0] < 0 or (np.diff(chunks.astype(np.int64)) < 0).any()):
        return ["does not rise: it holds where forces begin, the cumulative sum of the numbers of atoms"]
    return []


_CHECKS: dict[str, Callable[[np.ndarray, np.ndarray | None], list[str]]] = {
    "ids": _ids,
    "energy": _energy,
    "forces": _forces,
    "chunk_idx": _chunk_idx,
}

"""ASE-LMDB files: the LMDB backend of the ASE database (`ase-db-backends`), which fairchem-core 2 trains on.

A file holds rows `1`, `2`, … (compressed JSON of an `ase.db` row), `nextid`, `deleted_ids` and `metadata`.
This module shows such a file under the keys of ours, so that what reads OC20's and our files reads it as
well. That needs no further package; writing (ase_lmdb_writer.py) needs `ase-db-backends`.

    row                                       data object
    numbers, positions, cell, pbc, tags       the same; without pbc not periodic. Tags that are all 0 are none
                                              in files of others: then fixed atoms get 0, others 1
    constraints                               fixed: atoms that they hold in every direction
    energy, forces                            the same; forces as stored, those on fixed atoms too
    stress                                    the same, all nine components
    data: sid, fid, y_init, y_relaxed, …      the same; without sid it is the id of the row
    metadata: energy_kind, provenance         of the dataset
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from datasets_oc20 import structure_record as records
from datasets_oc20.constraints import NEVER_HOLD, constraints_from_records, held_atoms
from datasets_oc20.errors import DataError
from datasets_oc20.lmdb_file import LmdbFile, open_lmdb
from datasets_oc20.schema import LARGEST_ATOMS, as_array
from datasets_oc20.untrusted import AnyPath, inflate, load_json

EXTRA_FIELDS = ("y_init", "y_relaxed", "pos_relaxed")
_MOST_ROWS = 2**40
_LARGEST_ROW = 1 << 28
"""Bytes of the JSON of a row; one of a million atoms with forces has some 200 MB."""


_DTYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))} | {
    "float16",
    "float32",
    "float64",
}


class AseLmdbFile(LmdbFile):
    """An ASE-LMDB file under the keys of ours (writer.py): `0` … `n-1`, `length`, `metadata`."""

    def __init__(self, file: LmdbFile) -> None:
        self.path = file.path
        self._rows = file
        next_id, deleted = self._json(b"nextid"), self._json(b"deleted_ids") or []
        if type(next_id) is not int or next_id < 1 or not isinstance(deleted, list):
            raise DataError(
                f"{self.path}: the ids of the ASE database are not readable; write the file again."
            )
        # What is not the id of a row that was written says nothing of the rows that are there.
        if not all(type(row) is int and 0 < row < next_id for row in deleted) or next_id > _MOST_ROWS:
            raise DataError(
                f"{self.path}: deleted_ids or nextid of the ASE database hold impossible ids; write the file "
                "again."
            )
        # Row i has the id i + 1 + the number of deleted ids below.
        gone = np.unique(np.asarray(deleted, dtype=np.int64))
        self._deleted_below = gone - np.arange(len(gone)) - 1
        self.length = next_id - 1 - len(gone)
        if self.length > self._rows.entries():
            raise DataError(
                f"{self.path}: nextid of the ASE database promises {self.length} rows, and the file has "
                f"{self._rows.entries()} entries; write the file again."
            )
        self._ours = self.get(b"metadata") is not None

    def get(self, key: bytes) -> bytes | None:
        """The value of one of our keys; a row comes as a packed record."""
        if key == b"length":
            return str(self.length).encode("ascii")
        if key == b"metadata":
            stored = self._json(key)
            # Of files that were not written here nobody says which kind their energies are.
            if not isinstance(stored, dict) or "format_version" not in stored:
                return None
            try:
                return orjson.dumps(stored)
            except orjson.JSONEncodeError as error:  # numbers of more than 64 bits, too deep
                raise DataError(
                    f"{self.path}, key metadata: not readable ({error}); write the file again."
                ) from error
        if not key.isdigit() or int(key) >= self.length:
            return None
        row_id = int(key) + 1 + int(np.searchsorted(self._deleted_below, int(key), side="right"))
        row = self._json(str(row_id).encode("ascii"))
        where = f"{self.path}, row {row_id}"
        return None if row is None else records.pack(_fields(row, str(row_id), where, self._ours), where)

    def entries(self) -> int:
        """Number of our keys."""
        return self.length + sum(self.get(key) is not None for key in (b"length", b"metadata"))

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    def _json(self, key: bytes) -> Any:
        value = self._rows.get(key)
        if value is None:
            return None
        where = f"{self.path}, key {key.decode()}"
        try:
            text = inflate(value, _LARGEST_ROW, where)
            try:
                return orjson.loads(text)
            except orjson.JSONDecodeError:  # NaN, which ASE writes and JSON has not
                return load_json(text, where, _LARGEST_ROW, nonfinite=True)
        except DataError as error:
            said = str(error).removeprefix(f"{where}: ").removesuffix(".")
            raise DataError(f"{where}: not of an ASE database ({said}); write the file again.") from error


def open_shard(path: AnyPath) -> LmdbFile:
    """The open file for `path`, be it OC20's, ours or an ASE-LMDB."""
    path = Path(path)
    file = open_lmdb(path)
    return file if file.get(b"nextid") is None else AseLmdbFile(file)


def _fields(row: Any, row_id: str, where: str, ours: bool) -> dict[str, Any]:
    """The fields of the data object from an `ase.db` row; `row_id` is its name where it has none.

    `ours`: `AseLmdbWriter` wrote the file, whose tags are OC20's also where all are 0.
    """
    try:
        plain = {name: _plain(value) for name, value in row.items()}
        data = {name: _plain(value) for name, value in (row.get("data") or {}).items()}
        natoms = as_array(plain["numbers"], "atomic_numbers", where).size
        constraints = row.get("constraints") or []
        if isinstance(constraints, str):  # as ASE's SQL backends keep them
            constraints = load_json(constraints, where)
        names = {**plain.get("key_value_pairs", {}), **data}
        fixed = _fixed(constraints, natoms, plain.get("cell"), where)
        fields = {
            "pos": plain["positions"],
            "atomic_numbers": plain["numbers"],
            "cell": plain.get("cell", np.zeros((3, 3))),
            "pbc": plain.get("pbc", np.zeros(3, dtype=bool)),
            "tags": _tags(plain.get("tags"), fixed, where, ours),
            "fixed": fixed,
            "energy": plain.get("energy"),
            "forces": plain.get("forces"),
            "stress": _stress(plain.get("stress"), where),
            "sid": names.get("sid", row_id),
            "fid": names.get("fid", 0),
            "natoms": plain.get("natoms"),
        }
    except DataError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
        said = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{where}: not a row of an ASE database ({said}); write the file again.") from error
    fields |= {name: data[name] for name in EXTRA_FIELDS if name in data}
    return {name: value for name, value in fields.items() if value is not None}


def _stress(stress: Any, where: str) -> np.ndarray | None:
    """`[3, 3]`, also from ASE's six components."""
    if stress is None:
        return None
    array = as_array(stress, "stress", where)
    return voigt_6_to_full_3x3_stress(array.reshape(6)) if array.size == 6 else array.reshape(3, 3)


def _tags(tags: Any, fixed: np.ndarray, where: str, keep: bool) -> Any:
    """`tags`, or where there are none (all 0, unless `keep`) 0 for fixed atoms and 1 for the others.

    Raises:
        DataError: neither tags nor fixed atoms: nothing says what is slab and what adsorbate.
    """
    if tags is not None and (keep or as_array(tags, "tags", where).any()):
        return tags
    if tags is None and not fixed.any():
        raise DataError(
            f"{where}: has no tags and no constraint; call atoms.set_tags (0 subsurface, 1 surface, "
            "2 adsorbate) or set FixAtoms on the atoms that DFT held, and db.write the structure again."
        )
    return np.where(fixed, 0, 1)


def _fixed(constraints: Any, natoms: int, cell: Any, where: str) -> np.ndarray:
    """`[N]` bool: atoms that the constraints of a row hold in every direction."""
    if not constraints:
        return np.zeros(natoms, dtype=bool)
    found = constraints_from_records([_checked(item, natoms, where) for item in constraints], where)
    try:
        return held_atoms(Atoms(f"X{natoms}", cell=cell), found)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _checked(constraint: Any, natoms: int, where: str) -> Any:
    """The record of a constraint with arrays for lists and indices of atoms that exist."""
    kwargs = constraint.get("kwargs") if isinstance(constraint, dict) else None
    if not isinstance(kwargs, dict):
        return constraint
    kwargs = {name: _plain(value) for name, value in kwargs.items()}
    if constraint.get("name") not in NEVER_HOLD:
        what = f"{where}: the constraint {str(constraint.get('name'))[:40]}"
        kwargs |= {
            name: _indices(kwargs[name], natoms, what) for name in ("indices", "a", "index") if name in kwargs
        }
    return {**constraint, "kwargs": kwargs}


def _indices(given: Any, natoms: int, what: str) -> np.ndarray:
    """Indices or a mask, as ASE's constraints take them; from the end where negative."""
    given = as_array(_plain(given), "indices", what).reshape(-1)
    if given.dtype.kind == "b":
        if len(given) != natoms:
            raise DataError(f"{what} has a mask of {len(given)} for {natoms} atoms; write the row again.")
        return np.flatnonzero(given)
    if given.dtype.kind == "f" and len(given):
        raise DataError(f"{what} holds {given[0]:g}, not whole numbers; write the row again.")
    wrong = given[(given < -natoms) | (given >= natoms)]
    if len(wrong):
        raise DataError(f"{what} names atom {wrong[0]} of {natoms}; write the row again.")
    if len(np.unique(given)) < len(given):
        raise DataError(f"{what} names atoms twice, perhaps meant as a mask; write the row again.")
    return given.astype(np.int64)


def _plain(value: Any) -> Any:
    """Arrays for `{"__ndarray__": [shape, dtype, numbers]}`, as ASE writes them; everything else as it is.

    Raises:
        ValueError: an array that is too large or of something else than numbers.
    """
    if not isinstance(value, dict) or "__ndarray__" not in value:
        return value
    shape, dtype, flat = value["__ndarray__"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array has an impossible shape")
    if dtype not in _DTYPES or not isinstance(flat, list) or math.prod(shape) != len(flat):
        raise ValueError("an array does not hold the numbers that it says")
    if len(flat) > 9 * LARGEST_ATOMS:
        raise ValueError("an array is too large")
    exact = np.array(flat)
    if exact.dtype.kind in "biuf" and exact.dtype.kind != np.dtype(dtype).kind and not _fits(exact, dtype):
        raise ValueError(f"an array of {dtype} holds other values")
    return np.array(flat, dtype=dtype).reshape(shape)


def _fits(values: np.ndarray, dtype: str) -> bool:
    """Tell whether the values stay the same in `dtype`."""
    with np.errstate(invalid="ignore"):
        return bool(np.array_equal(values.astype(dtype), values, equal_nan=True))

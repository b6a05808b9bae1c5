"""Reader of ASE-LMDB files: the LMDB backend of the ASE database (`ase-db-backends`), for fairchem-core 2.

A file holds rows `1`, `2`, … (compressed JSON of an `ase.db` row), `nextid`, `deleted_ids` and `metadata`.
This module presents such a file under the keys of ours, so that the reader of OC20's and our files reads it
as well. That needs no other package; writing (ase_lmdb_writer.py) needs `ase-db-backends`.

    row                                       data object
    numbers, positions, cell, pbc, tags       the same; without pbc not periodic. In third-party files, tags
                                              that are all 0 are replaced by 0 for fixed atoms, 1 for others
    constraints                               fixed: atoms that they hold in every direction
    energy, forces                            the same; forces as stored, those on fixed atoms too
    stress                                    the same, all nine components
    data: sid, fid, y_init, y_relaxed, …      the same; without sid it is folder, file and id of the row
    metadata: energy_kind, provenance         of the dataset
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from datasets_oc20.constraints import NEVER_HOLD, constraints_from_records, held_atoms
from datasets_oc20.errors import DataError
from datasets_oc20.lmdb_file import LmdbFile, open_lmdb
from datasets_oc20.schema import LARGEST_ATOMS, as_array
from datasets_oc20.structure_record import pack
from datasets_oc20.untrusted import AnyPath, inflate, load_json

EXTRA_FIELDS = ("y_init", "y_relaxed", "pos_relaxed")
_MAX_ROWS = 2**40
_MAX_ROW_BYTES = 1 << 28
"""Maximum bytes of the JSON of a row; one of a million atoms with forces has some 200 MB."""
_DTYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))} | {
    "float16",
    "float32",
    "float64",
}


class AseLmdbFile(LmdbFile):
    """An ASE-LMDB file under the keys of ours (writer.py): `0` … `n-1`, `length`, `metadata`.

    Args:
        file: the open file.

    Attributes:
        length: number of rows.

    Raises:
        DataError: the ids of the rows are damaged.
    """

    def __init__(self, file: LmdbFile) -> None:
        self.path = file.path
        self._rows = file
        next_id, deleted = self._json(b"nextid"), self._json(b"deleted_ids") or []
        if type(next_id) is not int or next_id < 1 or not isinstance(deleted, list):
            raise DataError(
                f"{self.path}: the ids of the ASE database are not readable; write the file again."
            )
        # Ids of rows that were never written would shift all others.
        if not all(type(row) is int and 0 < row < next_id for row in deleted) or next_id > _MAX_ROWS:
            raise DataError(
                f"{self.path}: deleted_ids or nextid of the ASE database hold impossible ids; write the file "
                "again."
            )
        # Row i has the id i + 1 + the number of deleted ids below.
        deleted_ids = np.unique(np.asarray(deleted, dtype=np.int64))
        self._deleted_below = deleted_ids - np.arange(len(deleted_ids)) - 1
        self.length = next_id - 1 - len(deleted_ids)
        if self.length > self._rows.entries():
            raise DataError(
                f"{self.path}: nextid of the ASE database promises {self.length} rows, and the file has "
                f"{self._rows.entries()} entries; write the file again."
            )
        self._is_ours = self.get(b"metadata") is not None

    def get(self, key: bytes) -> bytes | None:
        """Return the value of one of our keys; a row is converted to a packed record."""
        if key == b"length":
            return str(self.length).encode("ascii")
        if key == b"metadata":
            stored = self._json(key)
            # Third-party files do not state the kind of their energies.
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
        row, row_id, where = self._row(int(key))
        if row is None:
            return None
        # Every file counts its rows from 1: an id alone would name rows of all shards alike.
        place = "-".join([*self.path.absolute().with_suffix("").parts[-2:], row_id])
        name = re.sub(r"[^\w-]", "_", place)
        return pack(AseRow(row, where).fields(name, self._is_ours), where)

    def raw_fields(self, index: int) -> dict[str, Any]:
        """Return the unchecked fields of a row, and its key-value pairs and data under `names`.

        Args:
            index: number of the row, from 0; a row needs neither tags nor constraints here.

        Raises:
            DataError: the row is missing or not readable.
        """
        row, row_id, where = self._row(index)
        if row is None:
            raise DataError(f"{where}: the file has no such row; write it again.")
        return AseRow(row, where).fields(row_id, None, with_names=True)

    def _row(self, index: int) -> tuple[Any, str, str]:
        """Return the JSON of a row (None without one), its id, and its place for messages."""
        row_id = index + 1 + int(np.searchsorted(self._deleted_below, index, side="right"))
        return self._json(str(row_id).encode("ascii")), str(row_id), f"{self.path}, row {row_id}"

    def entries(self) -> int:
        """Return the number of our keys."""
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
            text = inflate(value, _MAX_ROW_BYTES, where)
            try:
                return orjson.loads(text)
            except orjson.JSONDecodeError:  # NaN, which ASE writes and JSON does not allow
                return load_json(text, where, _MAX_ROW_BYTES, nonfinite=True)
        except DataError as error:
            reason = str(error).removeprefix(f"{where}: ").removesuffix(".")
            raise DataError(f"{where}: not of an ASE database ({reason}); write the file again.") from error


def open_shard(path: AnyPath) -> LmdbFile:
    """Return the open file for `path`, be it OC20's, ours or an ASE-LMDB; errors as `open_lmdb`."""
    path = Path(path)
    file = open_lmdb(path)
    return file if file.get(b"nextid") is None else AseLmdbFile(file)


class AseRow:
    """One row of an `ase.db` database, as JSON has it.

    Args:
        row: the decoded JSON.
        where: file and row, for error messages.
    """

    def __init__(self, row: Any, where: str) -> None:
        self._row, self._where = row, where

    def fields(self, name: str, keep_tags: bool | None, with_names: bool = False) -> dict[str, Any]:
        """Return the fields of the data object (`structure_record.make_data`).

        Args:
            name: of the system where the row has none.
            keep_tags: take tags that are all 0 as OC20's; False takes them as missing; None takes any tags,
                or none, as they are.
            with_names: add the key-value pairs and data under `names`.

        Raises:
            DataError: not a row of an ASE database, or one without tags and constraints.
        """
        row, where = self._row, self._where
        try:
            plain = {name: decode_array(value) for name, value in row.items()}
            data = {name: decode_array(value) for name, value in (row.get("data") or {}).items()}
            natoms = as_array(plain["numbers"], "atomic_numbers", where).size
            names = {**plain.get("key_value_pairs", {}), **data}
            fixed = self._fixed(natoms, plain.get("cell"))
            fields = {
                "pos": plain["positions"],
                "atomic_numbers": plain["numbers"],
                "cell": plain.get("cell", np.zeros((3, 3))),
                "pbc": plain.get("pbc", np.zeros(3, dtype=bool)),
                "tags": plain.get("tags")
                if keep_tags is None
                else self._tags(plain.get("tags"), fixed, keep_tags),
                "fixed": fixed,
                "energy": plain.get("energy"),
                "forces": plain.get("forces"),
                "stress": self._stress(plain.get("stress")),
                "sid": names.get("sid", name),
                "fid": names.get("fid", 0),
                "natoms": plain.get("natoms"),
            }
        except DataError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
            reason = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{where}: not a row of an ASE database ({reason}); write the file again."
            ) from error
        fields |= {name: data[name] for name in EXTRA_FIELDS if name in data}
        if with_names:
            fields["names"] = names
        return {name: value for name, value in fields.items() if value is not None}

    def _stress(self, stress: Any) -> np.ndarray | None:
        """Return `[3, 3]`, also from ASE's six components."""
        if stress is None:
            return None
        array = as_array(stress, "stress", self._where)
        return voigt_6_to_full_3x3_stress(array.reshape(6)) if array.size == 6 else array.reshape(3, 3)

    def _tags(self, tags: Any, fixed: np.ndarray, keep: bool) -> Any:
        """Return `tags`, or where there are none (all 0, unless `keep`) 0 for fixed atoms and 1 for others.

        Raises:
            DataError: neither tags nor fixed atoms tell slab from adsorbate.
        """
        if tags is not None and (keep or as_array(tags, "tags", self._where).any()):
            return tags
        if tags is None and not fixed.any():
            raise DataError(
                f"{self._where}: has no tags and no constraint; call atoms.set_tags (0 subsurface, "
                "1 surface, 2 adsorbate) or set FixAtoms on the atoms that DFT held, and db.write the "
                "structure again."
            )
        return np.where(fixed, 0, 1)

    def _fixed(self, natoms: int, cell: Any) -> np.ndarray:
        """Return `[N]` bool: atoms that the constraints hold in every direction."""
        records = self._row.get("constraints") or []
        if isinstance(records, str):  # as ASE's SQL backends keep them
            records = load_json(records, self._where)
        if not records:
            return np.zeros(natoms, dtype=bool)
        checked = [self._check_constraint(record, natoms) for record in records]
        constraints = constraints_from_records(checked, self._where)
        try:
            return held_atoms(Atoms(f"X{natoms}", cell=cell), constraints)
        except DataError as error:
            raise DataError(f"{self._where}: {error}") from error

    def _check_constraint(self, constraint: Any, natoms: int) -> Any:
        """Return the record of a constraint with arrays for lists and indices of atoms that exist."""
        kwargs = constraint.get("kwargs") if isinstance(constraint, dict) else None
        if not isinstance(kwargs, dict):
            return constraint
        kwargs = {name: decode_array(value) for name, value in kwargs.items()}
        if constraint.get("name") not in NEVER_HOLD:
            label = f"{self._where}: the constraint {str(constraint.get('name'))[:40]}"
            for name in ("indices", "a", "index"):
                if name in kwargs:
                    kwargs[name] = self._check_indices(kwargs[name], natoms, label)
        return {**constraint, "kwargs": kwargs}

    @staticmethod
    def _check_indices(indices: Any, natoms: int, label: str) -> np.ndarray:
        """Return indices from indices or a mask, as ASE's constraints take them; negative from the end."""
        given = as_array(decode_array(indices), "indices", label).reshape(-1)
        if given.dtype.kind == "b":
            if len(given) != natoms:
                raise DataError(
                    f"{label} has a mask of {len(given)} for {natoms} atoms; write the row again."
                )
            return np.flatnonzero(given)
        if given.dtype.kind == "f" and len(given):
            raise DataError(f"{label} holds {given[0]:g}, not whole numbers; write the row again.")
        outside = given[(given < -natoms) | (given >= natoms)]
        if len(outside):
            raise DataError(f"{label} names atom {outside[0]} of {natoms}; write the row again.")
        if len(np.unique(given)) < len(given):
            raise DataError(f"{label} names atoms twice, perhaps meant as a mask; write the row again.")
        return given.astype(np.int64)


def decode_array(value: Any) -> Any:
    """Decode `{"__ndarray__": [shape, dtype, numbers]}`, as ASE writes arrays; return all else unchanged.

    Raises:
        ValueError: the array is too large, or holds something other than numbers of its dtype.
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
    if exact.dtype.kind in "biuf" and exact.dtype.kind != np.dtype(dtype).kind:
        with np.errstate(invalid="ignore"):
            unchanged = np.array_equal(exact.astype(dtype), exact, equal_nan=True)
        if not unchanged:
            raise ValueError(f"an array of {dtype} holds other values")
    return np.array(flat, dtype=dtype).reshape(shape)

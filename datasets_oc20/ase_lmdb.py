"""ASE-LMDB files: the LMDB backend of the ASE database (`ase-db-backends`), which fairchem-core 2 trains on.

A file holds rows `1`, `2`, … (compressed JSON of an `ase.db` row), `nextid`, `deleted_ids` and `metadata`.
This module shows such a file under the keys of ours, so that what reads OC20's and our files reads it as
well. That needs no further package; writing (ase_lmdb_writer.py) needs `ase-db-backends`.

    row                                       data object
    numbers, positions, cell, pbc, tags       the same; without pbc not periodic
    constraints                               fixed: atoms that they hold in every direction
    energy, forces                            the same; forces as stored, those on fixed atoms too
    stress                                    the same, all nine components
    data: sid, fid, y_init, y_relaxed, …      the same
    metadata: energy_kind, provenance         of the dataset
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from datasets_oc20 import records
from datasets_oc20.constraints import constraints_from_records, held_atoms
from datasets_oc20.errors import DataError
from datasets_oc20.lmdb_file import LmdbFile, open_lmdb
from datasets_oc20.untrusted import AnyPath

EXTRA_FIELDS = ("y_init", "y_relaxed", "pos_relaxed")


class AseLmdbFile(LmdbFile):
    """An ASE-LMDB file under the keys of ours (writer.py): `0` … `n-1`, `length`, `metadata`."""

    def __init__(self, file: LmdbFile) -> None:
        self.path, self.environment = file.path, file.environment
        self._file = file
        next_id, deleted = self._json(b"nextid"), self._json(b"deleted_ids") or []
        if not isinstance(next_id, int) or not isinstance(deleted, list):
            raise DataError(
                f"{self.path}: the ids of the ASE database are not readable; write the file again."
            )
        # Row i has the id i + 1 + the number of deleted ids below.
        gone = np.unique(np.asarray(deleted, dtype=np.int64))
        self._deleted_below = gone - np.arange(len(gone)) - 1
        self.length = next_id - 1 - len(gone)

    def get(self, key: bytes) -> bytes | None:
        """The value of one of our keys; a row comes as a packed record."""
        if key == b"length":
            return str(self.length).encode("ascii")
        if key == b"metadata":
            stored = self._json(key)
            # Of files that were not written here nobody says which kind their energies are.
            return orjson.dumps(stored) if isinstance(stored, dict) and "format_version" in stored else None
        if not key.isdigit() or int(key) >= self.length:
            return None
        row_id = int(key) + 1 + int(np.searchsorted(self._deleted_below, int(key), side="right"))
        row = self._json(str(row_id).encode("ascii"))
        where = f"{self.path}, row {row_id}"
        return None if row is None else records.pack(_fields(row, where), where)

    def entries(self) -> int:
        """Number of our keys."""
        return self.length + sum(self.get(key) is not None for key in (b"length", b"metadata"))

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()

    def _json(self, key: bytes) -> Any:
        value = self._file.get(key)
        if value is None:
            return None
        try:
            text = zlib.decompress(value)
            try:
                return orjson.loads(text)
            except orjson.JSONDecodeError:  # NaN, which ASE writes and JSON has not
                return json.loads(text)
        except (zlib.error, ValueError) as error:
            raise DataError(
                f"{self.path}, key {key.decode()}: not of an ASE database ({error}); write the file again."
            ) from error


def open_shard(path: AnyPath) -> LmdbFile:
    """The open file for `path`, be it OC20's, ours or an ASE-LMDB."""
    path = Path(path)
    file = open_lmdb(path)
    return file if file.get(b"nextid") is None else AseLmdbFile(file)


def _fields(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of the data object from an `ase.db` row."""
    try:
        plain = {name: _plain(value) for name, value in row.items()}
        data = {name: _plain(value) for name, value in (row.get("data") or {}).items()}
        numbers = plain["numbers"]
        constraints = row.get("constraints") or []
        if isinstance(constraints, str):  # as ASE's SQL backends keep them
            constraints = orjson.loads(constraints)
        names = {**plain.get("key_value_pairs", {}), **data}
        fields = {
            "pos": plain["positions"],
            "atomic_numbers": numbers,
            "cell": plain.get("cell", np.zeros((3, 3))),
            "pbc": plain.get("pbc", np.zeros(3, dtype=bool)),
            "tags": plain.get("tags"),
            "energy": plain.get("energy"),
            "forces": plain.get("forces"),
            "stress": _stress(plain.get("stress")),
            "sid": str(names.get("sid", "")),
            "fid": int(str(names.get("fid", 0)).removeprefix("frame")),
        }
        fields["fixed"] = _fixed(constraints, fields, where)
    except DataError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not a row of an ASE database ({error}); write the file again.") from error
    fields |= {name: data[name] for name in EXTRA_FIELDS if name in data}
    return {name: value for name, value in fields.items() if value is not None}


def _stress(stress: Any) -> np.ndarray | None:
    """`[3, 3]`, also from ASE's six components."""
    if stress is None:
        return None
    stress = np.asarray(stress, dtype=np.float64)
    return voigt_6_to_full_3x3_stress(stress) if stress.size == 6 else stress.reshape(3, 3)


def _fixed(constraints: list[Any], fields: dict[str, Any], where: str) -> np.ndarray:
    """`[N]` bool: atoms that the constraints of a row hold in every direction."""
    natoms = len(fields["atomic_numbers"])
    if not constraints:
        return np.zeros(natoms, dtype=bool)
    found = constraints_from_records([_plain_kwargs(constraint) for constraint in constraints], where)
    try:
        return held_atoms(Atoms(f"X{natoms}", cell=fields["cell"]), found)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _plain_kwargs(constraint: Any) -> Any:
    kwargs = constraint.get("kwargs") if isinstance(constraint, dict) else None
    if not isinstance(kwargs, dict):
        return constraint
    return {**constraint, "kwargs": {name: _plain(value) for name, value in kwargs.items()}}


def _plain(value: Any) -> Any:
    """Arrays for lists and for `{"__ndarray__": [shape, dtype, numbers]}`, as ASE writes them."""
    if isinstance(value, dict) and "__ndarray__" in value:
        shape, dtype, flat = value["__ndarray__"]
        return np.array(flat, dtype=dtype).reshape(shape)
    return np.array(value) if isinstance(value, list) else value

"""The data object of one structure, its checks, and its packed form on disk.

A packed record holds no pickle: a magic number, the checksum of all that follows it, the length of a JSON
header, the header, and the raw little-endian bytes of the arrays in the order the header lists them.

    b"EOC1" | uint32 CRC-32 | uint32 header length | header | bytes
    header = {"sid", "fid", "arrays": [[name, dtype, shape], ...]}

Positions, cells and energies are float64, in memory and on disk: a total energy of 5e5 eV has steps of 31 meV
in float32. Files from before hold them in float32 and are read as well.
"""

import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import torch
from torch_geometric.data import Data

from datasets_oc20.errors import DataError
from datasets_oc20.schema import FIELDS, STORED, checked_arrays, checked_fid, checked_sid

MAGIC = b"EOC1"
ENERGY_KINDS = ("adsorption", "total")

_PREFIX, _LENGTH = struct.Struct("<4sI"), struct.Struct("<I")


def check_energy_kind(kind: str | None) -> str | None:
    """Return `kind`, or raise `DataError` unless it is None, "adsorption" or "total"."""
    if kind is not None and kind not in ENERGY_KINDS:
        raise DataError(f"energy_kind is {kind!r}; it must be one of {', '.join(ENERGY_KINDS)}.")
    return kind


def make_data(fields: Mapping[str, Any], where: str) -> Data:
    """Build the checked data object of one structure.

    Args:
        fields: `pos [N,3]` Å, `atomic_numbers [N]`, `cell [1,3,3]` Å, `pbc [1,3]`, `tags [N]`,
            `fixed [N]`, `sid`, `fid`; optional `energy [1]` eV, `forces [N,3]` eV/Å, `stress [1,3,3]` eV/Å^3
            (ASE's sign) and, for relaxed targets, `y_init [1]`, `y_relaxed [1]` eV and `pos_relaxed [N,3]` Å.
            Arrays, tensors or numbers that reshape to these shapes. Forces and stress become float32, the
            other lengths and energies float64.
        where: file and key, for the error message.

    Raises:
        DataError: as `schema.checked_arrays`, `checked_sid` and `checked_fid`; its `sid` is set.
    """
    arrays, sid, fid = _check_fields(fields, where)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Data(**tensors, natoms=tensors["pos"].shape[0], sid=sid, fid=fid)


def _check_fields(fields: Mapping[str, Any], where: str) -> tuple[dict[str, np.ndarray], str, int]:
    """Return checked arrays, `sid` and `fid`; a `DataError` gets the `sid` of the system, if it has one."""
    sid = checked_sid(fields.get("sid", ""), where)
    try:
        fid = checked_fid(fields.get("fid", 0), where)
        return checked_arrays(fields, where), sid, fid
    except DataError as error:
        error.sid = sid or None
        raise


def pack(data: Data | Mapping[str, Any], where: str = "record to write") -> bytes:
    """Pack one structure into the bytes that the module docstring describes.

    Args:
        data: a data object, or the fields that `make_data` takes.
        where: file and key, for the error message.

    Raises:
        DataError: as `make_data`.
    """
    arrays, sid, fid = _check_fields(data.to_dict() if isinstance(data, Data) else data, where)
    stored = {name: array.astype(FIELDS[name].stored) for name, array in arrays.items()}
    header = orjson.dumps(
        {
            "sid": sid,
            "fid": fid,
            "arrays": [[name, array.dtype.str, array.shape] for name, array in stored.items()],
        }
    )
    body = b"".join(array.tobytes() for array in stored.values())
    content = _LENGTH.pack(len(header)) + header + body
    return _PREFIX.pack(MAGIC, zlib.crc32(content)) + content


def known_fields(fields: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the arrays that `make_data` takes from `fields`."""
    return frozenset(name for name in FIELDS if fields.get(name) is not None)


class PackedRecord:
    """The bytes of one packed structure, of which the checksum and the header are checked.

    Nothing that the header says is believed before it fits the bytes that are there.

    Args:
        value: the stored bytes.
        where: file and key, for error messages.

    Attributes:
        arrays: name, dtype, shape and offset in bytes of every array.

    Raises:
        DataError: the record is damaged.
    """

    def __init__(self, value: bytes, where: str) -> None:
        self._value, self._where = value, where
        try:
            _, checksum = _PREFIX.unpack_from(value)
            if zlib.crc32(memoryview(value)[_PREFIX.size :]) != checksum:
                raise ValueError("its checksum is another")
            start = _PREFIX.size + _LENGTH.size
            (length,) = _LENGTH.unpack_from(value, _PREFIX.size)
            if length > len(value) - start:
                raise ValueError("its header is longer than the record")
            header = orjson.loads(value[start : start + length])
            if not isinstance(header, dict) or not {"arrays", "sid", "fid"} <= header.keys():
                raise ValueError("its header has no arrays, sid and fid")
            self._header: dict[str, Any] = header
            self.arrays = self._locate_arrays(header["arrays"], start + length, len(value))
        except (struct.error, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{where}: the record is damaged ({error}); write the dataset again.") from error

    @staticmethod
    def matches(value: bytes) -> bool:
        """Tell whether `value` begins like a record of this format."""
        return value.startswith(MAGIC)

    @property
    def natoms(self) -> int:
        """Number of atoms, from the header alone; raises `DataError` without positions."""
        sizes = {name: shape for name, _, shape, _ in self.arrays}
        if sizes.get("pos") is None or not sizes["pos"] or not sizes["pos"][0]:
            raise DataError(f"{self._where}: the record has no positions; write the dataset again.")
        return sizes["pos"][0]

    @property
    def fields(self) -> frozenset[str]:
        """Names of the arrays, from the header alone."""
        return frozenset(name for name, *_ in self.arrays)

    def to_data(self) -> Data:
        """Build the checked data object; raises `DataError` like `make_data`."""
        arrays = {
            name: np.frombuffer(self._value, dtype, math.prod(shape), offset).reshape(shape)
            for name, dtype, shape, offset in self.arrays
        }
        return make_data({**arrays, "sid": self._header["sid"], "fid": self._header["fid"]}, self._where)

    @staticmethod
    def _locate_arrays(entries: Any, offset: int, size: int) -> list[tuple[str, np.dtype, list[int], int]]:
        """Check the list of arrays; `ValueError` unless they fill the record from `offset` to its end."""
        arrays: list[tuple[str, np.dtype, list[int], int]] = []
        if not isinstance(entries, list):
            raise ValueError("its header lists no arrays")
        for entry in entries:
            if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
                raise ValueError("its header has an array without name, type and shape")
            name, dtype, shape = entry
            if name not in FIELDS or any(name == other for other, *_ in arrays):
                raise ValueError(f"its header has an unknown or repeated field {name[:40]!r}")
            stored = STORED[name].get(dtype) if isinstance(dtype, str) else None
            if stored is None:
                raise ValueError(f"field {name} is stored as {str(dtype)[:40]}")
            if (
                not isinstance(shape, list)
                or len(shape) > 3
                or not all(type(n) is int and n >= 0 for n in shape)
            ):
                raise ValueError(f"field {name} has an impossible shape")
            arrays.append((name, stored, shape, offset))
            offset += math.prod(shape) * stored.itemsize
        if offset != size:
            raise ValueError("its arrays do not fill it")
        return arrays

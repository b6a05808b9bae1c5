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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        DataError: as `schema.checked_arrays`, `checked_sid` and `checked_fid`.
    """
    sid, fid = _names(fields, where)
    with _naming_system(sid):
        return _to_data(checked_arrays(fields, where), sid, fid)


def _names(fields: Mapping[str, Any], where: str) -> tuple[str, int]:
    sid = checked_sid(fields.get("sid", ""), where)
    with _naming_system(sid):
        return sid, checked_fid(fields.get("fid", 0), where)


def pack(data: Data | Mapping[str, Any], where: str = "record to write") -> bytes:
    """The packed bytes of one structure (module docstring); raises `DataError` like `make_data`."""
    fields = data.to_dict() if isinstance(data, Data) else data
    sid, fid = _names(fields, where)
    with _naming_system(sid):
        arrays = checked_arrays(fields, where)
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


def is_packed(value: bytes) -> bool:
    """Whether `value` is a record of this format."""
    return value.startswith(MAGIC)


def _read_header(
    value: bytes, where: str
) -> tuple[dict[str, Any], list[tuple[str, np.dtype, list[int], int]]]:
    """The JSON header of a packed record, and of every array its name, dtype, shape and offset.

    Nothing that the header says is believed before it fits the bytes that are there.
    """
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
        return header, _places(header["arrays"], start + length, len(value))
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: the record is damaged ({error}); write the dataset again.") from error


def _places(listed: Any, offset: int, size: int) -> list[tuple[str, np.dtype, list[int], int]]:
    """The arrays of a header; raises `ValueError` unless they fill the record from `offset` to its end."""
    found: list[tuple[str, np.dtype, list[int], int]] = []
    if not isinstance(listed, list):
        raise ValueError("its header lists no arrays")
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
            raise ValueError("its header has an array without name, type and shape")
        name, dtype, shape = entry
        if name not in FIELDS or any(name == other for other, *_ in found):
            raise ValueError(f"its header has an unknown or repeated field {name[:40]!r}")
        stored = STORED[name].get(dtype) if isinstance(dtype, str) else None
        if stored is None:
            raise ValueError(f"field {name} is stored as {str(dtype)[:40]}")
        if not isinstance(shape, list) or len(shape) > 3 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"field {name} has an impossible shape")
        found.append((name, stored, shape, offset))
        offset += math.prod(shape) * stored.itemsize
    if offset != size:
        raise ValueError("its arrays do not fill it")
    return found


def unpack(value: bytes, where: str) -> Data:
    """The data object of one packed record; raises `DataError` when it is damaged."""
    header, places = _read_header(value, where)
    arrays = {
        name: np.frombuffer(value, dtype, math.prod(shape), offset).reshape(shape)
        for name, dtype, shape, offset in places
    }
    return make_data({**arrays, "sid": header["sid"], "fid": header["fid"]}, where)


def packed_natoms(value: bytes, where: str) -> int:
    """The number of atoms of a packed record, from its header alone."""
    _, places = _read_header(value, where)
    sizes = {name: shape for name, _, shape, _ in places}
    if sizes.get("pos") is None or not sizes["pos"] or not sizes["pos"][0]:
        raise DataError(f"{where}: the record has no positions; write the dataset again.")
    return sizes["pos"][0]


def packed_fields(value: bytes, where: str) -> frozenset[str]:
    """The names of the arrays of a packed record, from its header alone."""
    header, _ = _read_header(value, where)
    return frozenset(str(name) for name, *_ in header["arrays"])


def known_fields(fields: Mapping[str, Any]) -> frozenset[str]:
    """Names of the arrays that `make_data` takes from `fields`."""
    return frozenset(name for name in FIELDS if fields.get(name) is not None)


@contextmanager
def _naming_system(sid: str) -> Iterator[None]:
    """Inside, a `DataError` gets the `sid` of the system, if it has one."""
    try:
        yield
    except DataError as error:
        error.sid = sid or None
        raise


def _to_data(arrays: Mapping[str, np.ndarray], sid: str, fid: int) -> Data:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Data(**tensors, natoms=tensors["pos"].shape[0], sid=sid, fid=fid)

"""The data object of one structure, its checks, and its packed form on disk.

A packed record holds no pickle: a magic number, the checksum of all that follows it, the length of a JSON
header, the header, and the raw little-endian bytes of the arrays in the order the header lists them.

    b"EOC1" | uint32 CRC-32 | uint32 header length | header | bytes
    header = {"sid", "fid", "arrays": [[name, dtype, shape], ...]}
"""

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

MAGIC = b"EOC1"
MAX_ATOMIC_NUMBER = 118
LARGEST_ENERGY = 1e9
"""eV; all electrons of thousands of heavy atoms have less. One larger label would spoil a mean and spread."""
LARGEST_FORCE = 1e4
"""eV/Å; OC20 keeps frames below 50, and nuclei would have to be some 0.1 Å apart."""
ENERGY_KINDS = ("adsorption", "total")

_PREFIX, _LENGTH = struct.Struct("<4sI"), struct.Struct("<I")
_FLOAT, _INT, _BOOL = np.dtype("<f4"), np.dtype("<i8"), np.dtype("?")
# name -> (dtype in the data object, dtype on disk, shape with N for the number of atoms)
_REQUIRED: dict[str, tuple[np.dtype, np.dtype, tuple[Any, ...]]] = {
    "pos": (_FLOAT, _FLOAT, ("N", 3)),
    "atomic_numbers": (_INT, np.dtype("u1"), ("N",)),
    "cell": (_FLOAT, _FLOAT, (1, 3, 3)),
    "pbc": (_BOOL, _BOOL, (1, 3)),
    "tags": (_INT, np.dtype("u1"), ("N",)),
    "fixed": (_BOOL, _BOOL, ("N",)),
}
_OPTIONAL: dict[str, tuple[np.dtype, np.dtype, tuple[Any, ...]]] = {
    "energy": (_FLOAT, _FLOAT, (1,)),
    "forces": (_FLOAT, _FLOAT, ("N", 3)),
    "stress": (_FLOAT, _FLOAT, (1, 3, 3)),
    "y_init": (_FLOAT, _FLOAT, (1,)),
    "y_relaxed": (_FLOAT, _FLOAT, (1,)),
    "pos_relaxed": (_FLOAT, _FLOAT, ("N", 3)),
}
_FIELDS = {**_REQUIRED, **_OPTIONAL}


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
            Arrays, tensors or numbers that reshape to these shapes.
        where: file and key, for the error message.

    Raises:
        DataError: a field is missing, has another size, or holds NaN, infinite or impossible values.
    """
    sid, fid = str(fields.get("sid", "")), int(fields.get("fid", 0))
    with _naming_system(sid):
        return _to_data(_checked_arrays(fields, where), sid, fid)


def pack(data: Data | Mapping[str, Any], where: str = "record to write") -> bytes:
    """The packed bytes of one structure (module docstring); raises `DataError` like `make_data`."""
    fields = data.to_dict() if isinstance(data, Data) else data
    arrays = _checked_arrays(fields, where)
    stored = {name: array.astype(_FIELDS[name][1]) for name, array in arrays.items()}
    header = orjson.dumps(
        {
            "sid": str(fields.get("sid", "")),
            "fid": int(fields.get("fid", 0)),
            "arrays": [[name, array.dtype.str, array.shape] for name, array in stored.items()],
        }
    )
    body = b"".join(array.tobytes() for array in stored.values())
    content = _LENGTH.pack(len(header)) + header + body
    return _PREFIX.pack(MAGIC, zlib.crc32(content)) + content


def is_packed(value: bytes) -> bool:
    """Whether `value` is a record of this format."""
    return value.startswith(MAGIC)


def _read_header(value: bytes, where: str) -> tuple[dict[str, Any], int]:
    """The JSON header of a packed record and the offset of its first array."""
    try:
        _, checksum = _PREFIX.unpack_from(value)
        if zlib.crc32(memoryview(value)[_PREFIX.size :]) != checksum:
            raise ValueError("its checksum is another")
        start = _PREFIX.size + _LENGTH.size
        (length,) = _LENGTH.unpack_from(value, _PREFIX.size)
        header = orjson.loads(value[start : start + length])
        header["arrays"], header["sid"], header["fid"]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: the record is damaged ({error}); write the dataset again.") from error
    return header, start + length


def unpack(value: bytes, where: str) -> Data:
    """The data object of one packed record; raises `DataError` when it is damaged."""
    header, offset = _read_header(value, where)
    arrays: dict[str, np.ndarray] = {}
    try:
        for name, dtype, shape in header["arrays"]:
            if np.dtype(dtype) != _FIELDS[name][1]:
                raise ValueError(f"field {name} is stored as {dtype}")
            count = int(np.prod(shape))
            array = np.frombuffer(value, dtype=_FIELDS[name][1], count=count, offset=offset)
            offset += array.nbytes
            arrays[name] = array.reshape(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: the record is damaged ({error}); write the dataset again.") from error
    with _naming_system(header["sid"]):
        return _to_data(_checked_arrays(arrays, where), header["sid"], int(header["fid"]))


def packed_natoms(value: bytes, where: str) -> int:
    """The number of atoms of a packed record, from its header alone."""
    header, _ = _read_header(value, where)
    for name, _, shape in header["arrays"]:
        if name == "pos":
            return int(shape[0])
    raise DataError(f"{where}: the record has no positions; write the dataset again.")


@contextmanager
def _naming_system(sid: str) -> Iterator[None]:
    """Inside, a `DataError` gets the `sid` of the system, if it has one."""
    try:
        yield
    except DataError as error:
        error.sid = sid or None
        raise


def _checked_arrays(fields: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    missing = [name for name in _REQUIRED if fields.get(name) is None]
    if missing:
        raise DataError(
            f"{where}: the record has no {' and no '.join(missing)}; it is not an OC20 record, or one from "
            "before these fields existed: preprocess the raw files again."
        )
    natoms = int(np.size(_as_array(fields["atomic_numbers"])))
    arrays = {}
    for name, (dtype, _, shape) in _FIELDS.items():
        if fields.get(name) is not None:
            arrays[name] = _shaped(_as_array(fields[name]), name, dtype, shape, natoms, where)
    _check_values(arrays, natoms, where)
    return arrays


def _as_array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _shaped(
    array: np.ndarray, name: str, dtype: np.dtype, shape: tuple[Any, ...], natoms: int, where: str
) -> np.ndarray:
    wanted = tuple(natoms if size == "N" else size for size in shape)
    if array.size != int(np.prod(wanted)):
        raise DataError(
            f"{where}: {name} has shape {list(array.shape)}, expected {list(wanted)} for {natoms} atoms."
        )
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: {name} holds {array.dtype}, not numbers.")
    return array.reshape(wanted).astype(dtype)


def _check_values(arrays: Mapping[str, np.ndarray], natoms: int, where: str) -> None:
    if natoms == 0:
        raise DataError(f"{where}: the record has no atoms.")
    for name, array in arrays.items():
        if array.dtype == _FLOAT and not np.isfinite(array).all():
            first = int(np.flatnonzero(~np.isfinite(array.reshape(array.shape[0], -1)).all(axis=1))[0])
            place = f" (atom {first})" if name in ("pos", "forces", "pos_relaxed") else ""
            raise DataError(f"{where}: {name} holds NaN or infinite values{place}; remove the record.")
    for name in ("energy", "y_init", "y_relaxed"):
        if name in arrays and abs(arrays[name][0]) > LARGEST_ENERGY:
            raise DataError(
                f"{where}: {name} is {arrays[name][0]:.4g} eV, which no structure has; remove the record."
            )
    if "forces" in arrays and np.abs(arrays["forces"]).max() > LARGEST_FORCE:
        atom = int(np.flatnonzero((np.abs(arrays["forces"]) > LARGEST_FORCE).any(axis=1))[0])
        raise DataError(
            f"{where}: the force on atom {atom} is {arrays['forces'][atom].tolist()} eV/Å, which no usable "
            "frame has; remove the record."
        )
    numbers = arrays["atomic_numbers"]
    if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        atom = int(np.flatnonzero((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER))[0])
        raise DataError(f"{where}: atom {atom} has atomic number {numbers[atom]}, which no element has.")
    tags = arrays["tags"]
    if tags.min() < 0 or tags.max() > 2:
        atom = int(np.flatnonzero((tags < 0) | (tags > 2))[0])
        raise DataError(
            f"{where}: atom {atom} has tag {tags[atom]}; tags are 0 (held), 1 (free slab atom) or 2 "
            "(adsorbate), so set these in place of layer numbers of ASE's slab builders."
        )
    if arrays["pbc"].all() and abs(np.linalg.det(arrays["cell"][0].astype(np.float64))) < 1e-6:
        raise DataError(f"{where}: the structure is periodic but its cell has no volume.")


def _to_data(arrays: Mapping[str, np.ndarray], sid: str, fid: int) -> Data:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Data(**tensors, natoms=tensors["pos"].shape[0], sid=sid, fid=fid)

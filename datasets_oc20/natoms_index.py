"""The number of atoms of every record of an LMDB file, without reading the records twice."""

import contextlib
import io
from collections.abc import Iterable

import numpy as np
from rich.progress import track

from datasets_oc20 import foreign, records
from datasets_oc20.atomic import write_bytes
from datasets_oc20.errors import DataError
from datasets_oc20.lmdb_file import LmdbFile
from datasets_oc20.npz_file import read_npz
from datasets_oc20.schema import LARGEST_ATOMS


def natoms_of_shard(file: LmdbFile, length: int) -> np.ndarray:
    """`[length]` int32: from the key `natoms`, from the index beside the file, or by reading all records."""
    stored = file.get(b"natoms")
    if stored is not None:
        if len(stored) != 4 * length:
            raise DataError(f"{file.path}, key natoms: not {length} numbers; write the dataset again.")
        counts = np.frombuffer(stored, dtype="<i4").astype(np.int32)
        if length and not _possible(counts):
            raise DataError(f"{file.path}, key natoms: not numbers of atoms; write the dataset again.")
        return counts
    cache = file.path.with_name(file.path.name + ".natoms.npz")
    status = file.path.stat()
    identity = np.array([status.st_size, status.st_mtime_ns, length], dtype=np.int64)
    with contextlib.suppress(OSError, DataError):  # missing or damaged: counted again
        known, natoms = read_npz(cache, ("identity", "natoms"))
        if np.array_equal(known, identity) and natoms.shape == (length,) and _possible(natoms):
            return natoms.astype(np.int32)
    natoms = np.array([_natoms(file, key) for key in _progress(length, file)], dtype=np.int32)
    buffer = io.BytesIO()
    np.savez(buffer, natoms=natoms, identity=identity)
    with contextlib.suppress(OSError):  # a read-only folder: counted again next time
        write_bytes(cache, buffer.getvalue())
    return natoms


def _possible(natoms: np.ndarray) -> bool:
    """Tell whether these are numbers of atoms."""
    return bool(natoms.dtype.kind in "iu" and (natoms > 0).all() and (natoms <= LARGEST_ATOMS).all())


def _progress(length: int, file: LmdbFile) -> Iterable[int]:
    if length < 10_000:
        return range(length)
    return track(range(length), description=f"Counting atoms of {file.path.name}")


def _natoms(file: LmdbFile, key: int) -> int:
    where = f"{file.path}, key {key}"
    value = file.get(str(key).encode("ascii"))
    if value is None:
        raise DataError(f"{where}: the file has no such record; it is incomplete, write it again.")
    return (
        records.packed_natoms(value, where) if records.is_packed(value) else foreign.read_natoms(value, where)
    )

"""Writer of our LMDB files, which are written atomically and hold no pickle.

Keys: `0` … `n-1` packed records (structure_record.py); `length` the number n in ASCII; `natoms` n numbers,
little-endian int32; `metadata` JSON with the format, its version, the kind of energy, units and provenance.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
import numpy as np
import orjson
from torch_geometric.data import Data

from datasets_oc20.atomic import publish, remove_stale, temporary_beside
from datasets_oc20.errors import DataError
from datasets_oc20.structure_record import PackedRecord, check_energy_kind, pack

FORMAT = "equiformer2-oc20"
FORMAT_VERSION = 2
"""2: positions, cells and energies in float64."""
SPECIAL_KEYS = (b"length", b"metadata", b"natoms")
UNITS = {"pos": "Å", "cell": "Å", "energy": "eV", "forces": "eV/Å"}

_FIRST_MAP_SIZE = 1 << 26
_RECORDS_PER_TRANSACTION = 512


class LmdbWriter:
    """Writer of structures to one LMDB file; use it in a `with` block.

    The file is written beside `path` under a temporary name and renamed when the block ends without an
    exception; otherwise nothing is left.

    Args:
        path: the file to write; an existing one is replaced at the end.
        energy_kind: "adsorption", "total", or None for structures without a target.
        metadata: provenance to keep with the data (JSON values).

    Raises:
        DataError: a record is not valid, or nothing was written.
        OSError: the disk is full or the folder not writable.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        energy_kind: str | None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.energy_kind = check_energy_kind(energy_kind)
        self._metadata = dict(metadata or {})
        self._natoms: list[int] = []
        self._pending: list[tuple[bytes, bytes]] = []
        if not self.path.parent.is_dir():
            raise DataError(f"{self.path.parent}: no such folder; make it first.")
        if self.path.is_dir():
            raise DataError(f"{self.path}: is a folder; name a file.")
        remove_stale(self.path)
        self._temporary = temporary_beside(self.path)
        try:
            self._environment = lmdb.open(
                str(self._temporary), subdir=False, lock=False, sync=False, map_size=_FIRST_MAP_SIZE
            )
        except lmdb.Error as error:
            self._discard()
            raise OSError(f"{self.path}: cannot be written ({error}).") from error

    @property
    def count(self) -> int:
        """Number of records so far."""
        return len(self._natoms)

    def write(self, data: Data) -> None:
        """Append one structure; raise `DataError` if it is not valid."""
        where = f"{self.path}, record {self.count}"
        value = pack(data, where)
        self.write_packed(value, PackedRecord(value, where).natoms)

    def write_packed(self, value: bytes, natoms: int) -> None:
        """Append a packed record, e.g. one packed in another process.

        Args:
            value: bytes that `structure_record.pack` returned.
            natoms: number of atoms of the structure.
        """
        self._pending.append((str(self.count).encode("ascii"), value))
        self._natoms.append(natoms)
        if len(self._pending) >= _RECORDS_PER_TRANSACTION:
            self._flush()

    def close(self) -> None:
        """Complete the file and rename it to `path`; raise `DataError` if nothing was written."""
        if not self._natoms:
            self.abort()
            raise DataError(f"{self.path}: no record to write, so no file was written.")
        try:
            metadata = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "energy_kind": self.energy_kind,
                "units": UNITS,
                "provenance": self._metadata,
            }
            self._pending += [
                (b"length", str(self.count).encode("ascii")),
                (b"natoms", np.asarray(self._natoms, dtype="<i4").tobytes()),
                (b"metadata", orjson.dumps(metadata)),
            ]
            self._flush()
            self._sync()
            self._environment.close()
            publish(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove the unfinished file."""
        self._environment.close()
        self._discard()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def _flush(self) -> None:
        """Commit the pending records, in a larger map when they do not fit."""
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._pending:
                        transaction.put(key, value)
                break
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
            except lmdb.Error as error:
                raise OSError(f"{self.path}: cannot be written ({error}).") from error
        self._pending = []

    def _sync(self) -> None:
        try:
            self._environment.sync(True)
        except lmdb.Error as error:
            raise OSError(f"{self.path}: cannot be written ({error}).") from error

    def _discard(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()

"""`OC20Lmdb`: OC20's LMDB files, ours and ASE-LMDB, one file or a folder of shards, as a torch dataset."""

import bisect
import contextlib
import copy
import io
import logging
import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.progress import track
from torch.utils.data import Dataset, get_worker_info
from torch_geometric.data import Data

from datasets_oc20.ase_lmdb import open_shard
from datasets_oc20.atomic import write_bytes
from datasets_oc20.errors import DataError
from datasets_oc20.legacy_formats import LegacyRecord, read_length
from datasets_oc20.lmdb_file import LmdbFile
from datasets_oc20.npz_file import read_npz
from datasets_oc20.periodicity import Periodicity
from datasets_oc20.schema import LARGEST_ATOMS
from datasets_oc20.structure_record import PackedRecord, check_energy_kind, known_fields, make_data
from datasets_oc20.untrusted import AnyPath, regular_file
from datasets_oc20.writer import FORMAT_VERSION, SPECIAL_KEYS

_LOG = logging.getLogger(__name__)


class _Shard:
    """One open LMDB file of a dataset: its metadata and its numbers of records and atoms.

    Args:
        file: the open file, under our keys.
    """

    def __init__(self, file: LmdbFile) -> None:
        self.file = file

    def metadata(self) -> dict[str, Any]:
        """Decode the key `metadata`; empty where there is none, as in OC20's own files."""
        value = self.file.get(b"metadata")
        if value is None:
            return {}
        try:
            metadata = orjson.loads(value)
            version = int(metadata["format_version"])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{self.file.path}, key metadata: not readable; write the dataset again."
            ) from error
        if version > FORMAT_VERSION:
            raise DataError(
                f"{self.file.path}: the file has format {version}, this version reads up to "
                f"{FORMAT_VERSION}; update equiformer2."
            )
        return dict(metadata)

    def length(self) -> int:
        """Number of records: the key `length`, or all entries, where OC20 wrote no such key."""
        file = self.file
        available = file.entries() - sum(file.get(key) is not None for key in SPECIAL_KEYS)
        value = file.get(b"length")
        if value is None:
            return available
        length = read_length(value, f"{file.path}, key length")
        if length > available:
            raise DataError(
                f"{file.path}: the key length says {length} records but only {available} are there; "
                "the file is incomplete, write it again."
            )
        if length < available and file.get(str(length).encode("ascii")) is not None:
            _LOG.warning(
                "%s: the key length says %d records, and those behind them (from key %d on) are not read; "
                "correct the key if they belong to the data.",
                file.path, length, length,
            )  # fmt: skip
        return length

    def record(self, key: int) -> tuple[bytes, str]:
        """Return the bytes of a record and its place (file and key), for messages."""
        where = f"{self.file.path}, key {key}"
        value = self.file.get(str(key).encode("ascii"))
        if value is None:
            raise DataError(f"{where}: the file has no such record; it is incomplete, write it again.")
        return value, where

    def natoms(self, length: int) -> np.ndarray:
        """Atoms per record, `[length]` int32, from the key `natoms`, the index file or the records."""
        file = self.file
        stored = file.get(b"natoms")
        if stored is not None:
            if len(stored) != 4 * length:
                raise DataError(f"{file.path}, key natoms: not {length} numbers; write the dataset again.")
            counts = np.frombuffer(stored, dtype="<i4").astype(np.int32)
            if length and not self._are_atom_counts(counts):
                raise DataError(f"{file.path}, key natoms: not numbers of atoms; write the dataset again.")
            return counts
        cache = file.path.with_name(file.path.name + ".natoms.npz")
        status = file.path.stat()
        identity = np.array([status.st_size, status.st_mtime_ns, length], dtype=np.int64)
        with contextlib.suppress(OSError, DataError):  # missing or damaged: counted again
            known, natoms = read_npz(cache, ("identity", "natoms"))
            if (
                np.array_equal(known, identity)
                and natoms.shape == (length,)
                and self._are_atom_counts(natoms)
            ):
                return natoms.astype(np.int32)
        natoms = self._count_atoms(length)
        buffer = io.BytesIO()
        np.savez(buffer, natoms=natoms, identity=identity)
        with contextlib.suppress(OSError):  # a read-only folder: counted again next time
            write_bytes(cache, buffer.getvalue())
        return natoms

    def _count_atoms(self, length: int) -> np.ndarray:
        """Read every record; a progress bar is shown for large files."""
        keys: Iterable[int] = range(length)
        if length >= 10_000:
            keys = track(keys, description=f"Counting atoms of {self.file.path.name}")
        natoms = np.empty(length, dtype=np.int32)
        for key in keys:
            value, where = self.record(key)
            is_packed = PackedRecord.matches(value)
            natoms[key] = (
                PackedRecord(value, where).natoms if is_packed else LegacyRecord(value, where).natoms()
            )
        return natoms

    @staticmethod
    def _are_atom_counts(natoms: np.ndarray) -> bool:
        return bool(natoms.dtype.kind in "iu" and (natoms > 0).all() and (natoms <= LARGEST_ATOMS).all())


class OC20Lmdb(Dataset[Data]):
    """The structures of an LMDB file, or of all LMDB files of a folder in the order of their names.

    Reads S2EF and IS2RE files of OC20 (written with PyG 1 or 2, with or without the key `length`), the
    files of `LmdbWriter`, and ASE-LMDB files (`*.aselmdb`). Files are mapped read-only when first read, once
    per process, so the dataset can be sent to forked and spawned workers; keys are computed, never listed.

    Args:
        path: an LMDB file, a folder of shards or an LMDB environment (a folder with `data.mdb`), or a list
            of them to read one after the other.
        energy_kind: "adsorption" or "total". Our files declare it; for OC20's own files, which do not,
            it must be given. Another kind than the file declares is an error.

    Attributes:
        labels: statements of the files about their labels (`data preprocess --labels`), sorted.
        settings: files that an import wrote, with the settings of their DFT calculations.

    Raises:
        DataError: missing, empty, truncated or damaged file, file that is named twice, value that is not an
            OC20 record, pickle that would run code, NaN in a field; the message names the file and the key.
    """

    def __init__(self, path: AnyPath | Sequence[AnyPath], energy_kind: str | None = None) -> None:
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        self.path = ", ".join(str(item) for item in paths)
        self.shards = [shard for item in paths for shard in self._find_shards(Path(item))]
        if not self.shards:
            raise DataError("no dataset is named; give an LMDB file or a folder of them.")
        first_names: dict[Path, Path] = {}
        for shard in self.shards:
            if first_names.setdefault(shard.resolve(), shard) is not shard:
                raise DataError(
                    f"{shard}: the file is named twice, its records would count twice; name it once."
                )
        lengths, kinds, labels = [], set(), set()
        self.settings: list[tuple[str, dict[str, str | float]]] = []
        for shard in self.shards:
            opened = _Shard(open_shard(shard))
            metadata = opened.metadata()
            kinds.add(check_energy_kind(metadata.get("energy_kind")))
            origin = metadata.get("provenance")
            origin = origin if isinstance(origin, dict) else {}
            labels.add(origin.get("labels"))
            stated = origin.get("settings")
            if isinstance(stated, dict):
                known = {name: value for name, value in stated.items() if isinstance(value, str | float)}
                self.settings.append((str(shard), known))
            lengths.append(opened.length())
        self._ends = list(accumulate(lengths))
        if self._ends[-1] == 0:
            raise DataError(f"{self.path}: the dataset has no records.")
        self.energy_kind = self._resolve_kind(kinds, check_energy_kind(energy_kind))
        self.labels = sorted(statement for statement in labels if isinstance(statement, str))
        self._rows: np.ndarray | None = None
        self._opened: dict[int, _Shard] = {}
        self._pid = os.getpid()
        self._natoms: np.ndarray | None = None
        self._periodicity: Periodicity | None = Periodicity()

    def __len__(self) -> int:
        """Return the number of structures."""
        return self._ends[-1] if self._rows is None else len(self._rows)

    def select(self, rows: Sequence[int] | np.ndarray, part: str) -> "OC20Lmdb":
        """Return a dataset of some of the structures, which are read from the same files.

        Args:
            rows: indices of the structures, in the order in which the dataset gives them.
            part: description of the part, for messages: it is put behind the path.
        """
        chosen = copy.copy(self)
        given = np.asarray(rows, dtype=np.int64)
        chosen._rows = given if self._rows is None else self._rows[given]
        chosen.path = f"{self.path} ({part})"
        chosen._opened, chosen._natoms = {}, None
        return chosen

    def __getitem__(self, index: int) -> Data:
        """Read the structure `index`; fields, shapes and units in docs/architecture.md."""
        shard, key = self._locate(index)
        value, where = self._open(shard).record(key)
        if PackedRecord.matches(value):
            data = PackedRecord(value, where).to_data()
        else:
            data = make_data(LegacyRecord(value, where).fields(), where)
        # Notices about periodic directions are given once; copies in other processes are silent.
        if self._periodicity is not None and get_worker_info() is None:
            self._periodicity.add(data.cell[0].numpy(), data.pbc[0].numpy(), f"key {key} (sid {data.sid!r})")
            self._periodicity.log(self.path)
        return data

    def fields(self, index: int) -> frozenset[str]:
        """Return the names of the arrays of structure `index`; of packed records from the header alone."""
        shard, key = self._locate(index)
        value, where = self._open(shard).record(key)
        if PackedRecord.matches(value):
            return PackedRecord(value, where).fields
        return known_fields(LegacyRecord(value, where).fields())

    @property
    def natoms(self) -> np.ndarray:
        """Number of atoms of every structure, `[len]` int32.

        Stored in our files. OC20's own files are read through once, and the result is kept beside
        them as `NAME.lmdb.natoms.npz` where the folder is writable.
        """
        if self._natoms is None:
            starts = [0, *self._ends[:-1]]
            parts = [
                self._open(index).natoms(end - start)
                for index, (start, end) in enumerate(zip(starts, self._ends, strict=True))
            ]
            every = np.concatenate(parts)
            self._natoms = every if self._rows is None else every[self._rows]
        return self._natoms

    def describe(self, index: int) -> str:
        """Name file and key of structure `index`, for messages."""
        shard, key = self._locate(index)
        return f"{self.shards[shard]}, key {key}"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, without open files."""
        # Workers read records and need no sizes, so their memory does not grow with the number of records.
        return {**self.__dict__, "_opened": {}, "_natoms": None, "_periodicity": None}

    def _locate(self, index: int) -> tuple[int, int]:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"{self.path}: index {index} of {len(self)} records")
        if self._rows is not None:
            position = int(self._rows[position])
        shard = bisect.bisect_right(self._ends, position)
        return shard, position - (self._ends[shard - 1] if shard else 0)

    def _open(self, shard: int) -> _Shard:
        """Return an open shard, opened again in a forked process, where the parent's handles are closed."""
        if self._pid != os.getpid():
            self._opened, self._pid = {}, os.getpid()
        if shard not in self._opened:
            self._opened[shard] = _Shard(open_shard(self.shards[shard]))
        return self._opened[shard]

    def _resolve_kind(self, declared: set[str | None], given: str | None) -> str | None:
        kinds = {kind for kind in declared if kind is not None}
        if len(kinds) > 1:
            raise DataError(f"{self.path}: the files mix adsorption and total energies; keep them apart.")
        kind = kinds.pop() if kinds else None
        if kind is not None and given is not None and kind != given:
            raise DataError(f"{self.path}: the file declares {kind} energies, but {given} was asked for.")
        return kind or given

    @staticmethod
    def _find_shards(path: Path) -> list[Path]:
        """List the LMDB files that `path` names."""
        if path.is_dir():
            ours, ase = sorted(path.glob("*.lmdb")), sorted(path.glob("*.aselmdb"))
            if ours and ase:
                raise DataError(
                    f"{path}: holds *.lmdb and *.aselmdb files, perhaps of the same data; name them."
                )
            if not ours and not ase:
                environment = path / "data.mdb"  # LMDB's own name, where a folder is one environment
                if environment.is_file():
                    return [environment]
                raise DataError(f"{path}: the folder holds no *.lmdb, *.aselmdb or data.mdb file.")
            return ours or ase
        with contextlib.suppress(OSError):  # opening reports a missing file
            regular_file(path)
        return [path]

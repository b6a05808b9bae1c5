"""`open_dataset`: LMDB files, or small sets of own results read into memory, behind one interface."""

import copy
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch_geometric.data import Data

from datasets_oc20.errors import DataError
from datasets_oc20.own_data.checks import differences
from datasets_oc20.own_data.discovery import find_sources, names_result
from datasets_oc20.own_data.importer import ImportOptions, read_set
from datasets_oc20.own_data.report import dropped_rows
from datasets_oc20.own_data.source_worker import Dropped
from datasets_oc20.periodicity import Periodicity
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.structure_record import PackedRecord, check_energy_kind
from datasets_oc20.untrusted import AnyPath

_LOG = logging.getLogger(__name__)
MAX_BYTES = 2 << 30
"""Most bytes of files that are read into memory."""
MAX_FRAMES = 10_000
"""Most frames that are read into memory."""
_MOST_LINES = 20
_IMPORT = "`equiformer2 data import`"
_IMPORT_OPTION = re.compile(r"--(?!energy-kind|out\b)[a-z][a-z-]*[a-z]")
_LMDB_ENDINGS = (".lmdb", ".aselmdb", ".mdb")


class MemoryDataset(OC20Lmdb):
    """Frames of any files that ASE reads, in memory, with the interface of `OC20Lmdb`.

    The files are read with all checks of an import; frames that it would drop are logged and left out.

    Args:
        paths: files and folders.
        energy_kind: "adsorption" or "total"; None takes what files declare, else "total".
        needs_energy: leave out frames without an energy; False keeps structures alone, too.

    Raises:
        DataError: no usable frame, too many for the memory, or a set that an import refuses.
    """

    def __init__(
        self, paths: Sequence[Path], energy_kind: str | None = None, needs_energy: bool = True
    ) -> None:
        self.path = ", ".join(str(path) for path in paths)
        found = find_sources(paths)
        size = sum(source.size for source in found.sources)
        if size > MAX_BYTES:
            raise self._too_large(f"{size >> 20} MiB")
        with tempfile.TemporaryDirectory() as folder:
            options = ImportOptions(energy_kind=energy_kind)
            try:
                frames = read_set(found, options, Path(folder), 1, needs_energy=needs_energy)
            except DataError as error:
                raise DataError(f"{_with_origin(str(error).rstrip('.'))}.") from error
            dropped = frames.dropped()
            kept = sum(len(result.frames) for result in frames.results)
            if kept > MAX_FRAMES:
                raise self._too_large(f"{kept} frames")
            if not kept:
                rows = dropped_rows(dropped)
                more = f", and {len(rows) - 1} more" if len(rows) > 1 else ""
                raise DataError(f"{self.path}: no frame can be used ({_with_origin(rows[0])}{more}).")
            _warn_of(dropped)
            self._records: list[bytes] = []
            self._places: list[str] = []
            natoms: list[int] = []
            for result, facts, record in frames.records():
                self._records.append(record)
                self._places.append(f"{result.file}, frame {facts.index}")
                natoms.append(facts.natoms)
        for text in frames.notices:
            _LOG.warning("%s: %s.", self.path, _with_origin(text))
        self.shards = [Path(source.name) for source in found.sources]
        self.energy_kind = frames.energy_kind
        self.labels, self.settings = [], []
        self._natoms = np.array(natoms, dtype=np.int32)
        self._periodicity: Periodicity | None = None

    def __len__(self) -> int:
        """Return the number of structures."""
        return len(self._records)

    def __getitem__(self, index: int) -> Data:
        """Build the structure `index`; fields, shapes and units in docs/architecture.md."""
        return self._record(index).to_data()

    def fields(self, index: int) -> frozenset[str]:
        """Return the names of the arrays of structure `index`."""
        return self._record(index).fields

    def select(self, rows: Sequence[int] | np.ndarray, part: str) -> "MemoryDataset":
        """Return a dataset of some of the structures, see `OC20Lmdb.select`."""
        chosen = copy.copy(self)
        chosen.path = f"{self.path} ({part})"
        places = np.asarray(rows, dtype=np.int64).tolist()
        chosen._records = [self._records[row] for row in places]
        chosen._places = [self._places[row] for row in places]
        chosen._natoms = self.natoms[places]
        return chosen

    def describe(self, index: int) -> str:
        """Name file and frame of structure `index`, for messages."""
        return self._places[index]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process."""
        return self.__dict__

    def _record(self, index: int) -> PackedRecord:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"{self.path}: index {index} of {len(self)} records")
        return PackedRecord(self._records[position], self._places[position])

    def _too_large(self, size: str) -> DataError:
        return DataError(
            f"{self.path}: has {size}, too much to be read into memory at every start; write it to a file "
            "once with "
            "`equiformer2 data import FILES --out NAME.lmdb` and give that."
        )


def _warn_of(dropped: Sequence[Dropped]) -> None:
    """Log what is left out, a line for all frames of a file with one reason, and at most `_MOST_LINES`."""
    rows = dropped_rows(dropped)
    for row in rows[:_MOST_LINES]:
        _LOG.warning("left out: %s.", _with_origin(row))
    if len(rows) > _MOST_LINES:
        _LOG.warning("left out: %d more files or frames.", len(rows) - _MOST_LINES)


def _with_origin(text: str) -> str:
    """Add which command has the options that a sentence of the import names."""
    names = sorted(set(_IMPORT_OPTION.findall(text)))
    if not names:
        return text
    are = f"is an option of {_IMPORT}" if len(names) == 1 else f"are options of {_IMPORT}"
    return f"{text} ({' and '.join(names)} {are}, whose file this command reads)"


def open_dataset(
    path: AnyPath | Sequence[AnyPath], energy_kind: str | None = None, needs_energy: bool = True
) -> OC20Lmdb:
    """Open data of any kind: LMDB files, or files and folders with results of DFT.

    LMDB and ASE-LMDB files and folders of them are opened as `OC20Lmdb`. Anything else (extended XYZ,
    trajectories, `ase.db` databases, outputs of VASP, Quantum ESPRESSO and GPAW, folders of these) is read
    into memory, with the checks of `equiformer2 data import`, and so are LMDB files that are named beside it.

    Args:
        path: a file, a folder, or a list of them.
        energy_kind: "adsorption" or "total", for files that do not declare it.
        needs_energy: leave out frames without an energy; False for structures to predict.

    Raises:
        DataError: as `OC20Lmdb` and `MemoryDataset`.
    """
    paths = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(item) for item in path]
    check_energy_kind(energy_kind)
    if all(is_lmdb(item) for item in paths):
        for item in paths:
            _warn_of_others(item)
        dataset = OC20Lmdb(path, energy_kind)
        if different := differences(dataset.settings):
            raise DataError(
                f"the files hold calculations with different settings, and so energies that cannot be "
                f"compared: {different[0]}; give one of them, or import the calculations together with "
                f"{_IMPORT} --mixed."
            )
        return dataset
    for item in paths:
        if not item.exists():
            raise DataError(f"{item}: no such file.")
    return MemoryDataset(paths, energy_kind, needs_energy)


def _warn_of_others(path: Path) -> None:
    """Log that files of other formats in a folder with LMDB files are not read."""
    if not path.is_dir():
        return
    others = sorted(
        item.name for item in path.iterdir() if names_result(item.name) and not is_lmdb(path / item.name)
    )
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        _LOG.warning(
            "%s: its LMDB files alone are read, not %s%s: name these, too, or keep them apart.",
            path,
            others[0],
            more,
        )


def is_lmdb(path: AnyPath) -> bool:
    """Tell whether `OC20Lmdb` is to open a path: an LMDB file, a folder of such, or nothing that exists."""
    path = Path(path)
    if path.is_dir():
        names = [item.name for item in path.iterdir()]
        return not names or any(name.endswith(_LMDB_ENDINGS) for name in names)
    if path.name.endswith(_LMDB_ENDINGS) or not path.exists() or not path.is_file():
        return True
    with path.open("rb") as file:  # LMDB's magic number, in the first page of data
        head = file.read(20)
    return head[16:20] == b"\xde\xc0\xef\xbe"

"""Writer of ASE-LMDB files, for fairchem-core 2 and everything that uses `ase.db`."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.stress import full_3x3_to_voigt_6_stress
from torch_geometric.data import Data

from datasets_oc20.ase_lmdb import EXTRA_FIELDS
from datasets_oc20.atomic import publish, temporary_beside
from datasets_oc20.errors import DataError
from datasets_oc20.structure_record import check_energy_kind, make_data
from datasets_oc20.writer import FORMAT, FORMAT_VERSION, UNITS

_ROWS_PER_TRANSACTION = 1000


class AseLmdbWriter:
    """Writer of structures to one ASE-LMDB file with `ase-db-backends`; use it in a `with` block.

    As with `LmdbWriter`, the file takes its name when the block ends without an exception; otherwise nothing
    is left.

    Args:
        path: the file to write; an existing one is replaced at the end.
        energy_kind: "adsorption", "total", or None for structures without a target.
        metadata: provenance to keep with the data (JSON values).

    Attributes:
        path: the file.
        energy_kind: as given.
        count: number of structures so far.

    Raises:
        DataError: `ase-db-backends` is missing, a record is not valid, or nothing was written.
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
        self.count = 0
        try:
            from ase_db_backends.aselmdb import LMDBDatabase
        except ImportError as error:
            raise DataError(
                "writing ASE-LMDB files needs the package ase-db-backends; install it with "
                "pip install '.[ase-lmdb]'."
            ) from error
        self._backend: Any = LMDBDatabase
        self._metadata = dict(metadata or {})
        self._pending: list[tuple[Atoms, dict[str, Any]]] = []
        if not self.path.parent.is_dir():
            raise DataError(f"{self.path.parent}: no such folder; make it first.")
        if self.path.is_dir():
            raise DataError(f"{self.path}: is a folder; name a file.")
        self._temporary = temporary_beside(self.path)

    def write(self, data: Data) -> None:
        """Append one structure; raise `DataError` if it is not valid."""
        checked = make_data(data.to_dict(), f"{self.path}, record {self.count}")
        # Fields that an ASE structure has no place for.
        extras = {name: checked[name].double().numpy() for name in EXTRA_FIELDS if name in checked}
        self._pending.append((_to_atoms(checked), {"sid": checked.sid, "fid": checked.fid, **extras}))
        self.count += 1
        if len(self._pending) >= _ROWS_PER_TRANSACTION:
            self._flush()

    def close(self) -> None:
        """Complete the file and rename it to `path`; raise `DataError` if nothing was written."""
        if not self.count:
            self.abort()
            raise DataError(f"{self.path}: no record to write, so no file was written.")
        try:
            self._flush(
                {
                    "format": f"{FORMAT}-ase",
                    "format_version": FORMAT_VERSION,
                    "energy_kind": self.energy_kind,
                    "units": UNITS,
                    "provenance": self._metadata,
                }
            )
            publish(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise
        self._lock_file().unlink(missing_ok=True)

    def abort(self) -> None:
        """Remove the unfinished file."""
        self._temporary.unlink(missing_ok=True)
        self._lock_file().unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def _flush(self, metadata: dict[str, Any] | None = None) -> None:
        """Commit the pending rows, and at the end the metadata."""
        try:
            with self._backend(self._temporary, use_lock_file=False) as database:
                # The backend looks every new id up in the list of all; those on the disk are not needed.
                database.ids.clear()
                for atoms, extras in self._pending:
                    database.write(atoms, data=extras)
                if metadata is not None:
                    database.metadata = metadata
        except lmdb.Error as error:
            raise OSError(f"{self.path}: cannot be written ({error}).") from error
        self._pending = []

    def _lock_file(self) -> Path:
        return self._temporary.with_name(f"{self._temporary.name}-lock")  # LMDB's, beside the temporary file


def _to_atoms(data: Data) -> Atoms:
    """Build the ASE structure with its targets."""
    atoms = Atoms(
        numbers=data.atomic_numbers.numpy(),
        positions=data.pos.double().numpy(),
        cell=data.cell[0].double().numpy(),
        pbc=data.pbc[0].numpy(),
        tags=data.tags.numpy(),
    )
    if data.fixed.any():
        atoms.set_constraint(FixAtoms(mask=data.fixed.numpy()))
    targets: dict[str, Any] = {}
    if "energy" in data:
        targets["energy"] = data.energy.item()
    if "forces" in data:
        targets["forces"] = data.forces.double().numpy()
    if "stress" in data:
        targets["stress"] = full_3x3_to_voigt_6_stress(data.stress[0].double().numpy())
    if targets:
        atoms.calc = SinglePointCalculator(atoms, **targets)
    return atoms

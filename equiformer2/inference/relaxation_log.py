"""Folder in which finished relaxations are kept line by line, so that a stopped run can go on.

A line is written after its trajectory, and each is on the disk before the next begins: whatever has a line is
complete. What was under way when a run was stopped has none.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ase import Atoms
from ase.io.trajectory import Trajectory

from datasets_oc20.atomic import publish, temporary_beside
from datasets_oc20.locking import exclusive
from equiformer2.errors import InputError
from equiformer2.files import write_json

Row = dict[str, Any]
_LONGEST_NAME = 200
"""Bytes; file systems allow 255 with the ending and the mark of a temporary file."""


class RelaxationLog:
    """`relaxed.jsonl`, `settings.json` and `trajectories/` in a folder.

    Args:
        path: the folder; it is made.
        asked: settings that the results depend on, plain values. A folder of other settings is refused.
        keys: keys that every line must have, and the types of their values.
        alone: refuse a folder that holds anything else; otherwise files of other names may be beside.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], keys: Mapping[str, type], alone: bool) -> None:
        self.path = path
        self.file = path / "relaxed.jsonl"
        self.settings = path / "settings.json"
        self.trajectories = path / "trajectories"
        self._asked = json.loads(json.dumps(asked, default=str))
        self._keys, self._alone = keys, alone

    @contextmanager
    def open(self) -> Iterator[list[Row]]:
        """Open the log for `append`, against other processes; gives the lines of earlier runs.

        Raises:
            InputError: the folder holds other relaxations or something else, or its files cannot be read.
            DataError: another process is relaxing into it.
        """
        self._check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file, exclusive(self.path / ".lock", self.file):
            self.trajectories.mkdir(exist_ok=True)
            if file.tell():  # relaxations of an earlier run
                self._check_same()
            else:
                write_json(self.settings, self._asked)
            rows, end = self._read(file)
            # What a killed run did not finish.
            file.truncate(end)
            for unfinished in self.trajectories.glob(".*.tmp"):
                unfinished.unlink()
            self._lines = file
            yield rows

    def append(self, row: Row) -> None:
        """Write a line; it is on the disk when this returns."""
        append_line(self._lines, row)

    def trajectory(self, name: str) -> Path:
        """Path of the trajectory of one relaxation."""
        return self.trajectories / f"{name}.traj"

    def write_trajectory(self, name: str, frames: Iterable[Atoms]) -> Path:
        """Write a whole trajectory, or none.

        Raises:
            OSError: the disk is full or the file cannot be written; it is named.
        """
        path = self.trajectory(name)
        temporary = temporary_beside(path)
        try:
            with Trajectory(str(temporary), "w") as writer:
                for frame in frames:
                    writer.write(frame)
            publish(temporary, path)
        except OSError as error:  # a full disk: ASE names no file, NumPy gives no number
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _check_free(self) -> None:
        if not self.path.exists() or (self.path.is_dir() and self.file.exists()):
            return
        own = [self.settings, self.trajectories, self.file]
        if not self.path.is_dir() or any(self.path.iterdir() if self._alone else map(os.path.lexists, own)):
            raise InputError(f"{self.path} holds something else than relaxations: give another folder")

    def _check_same(self) -> None:
        asked = self._asked
        try:
            before = dict(json.loads(self.settings.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.settings} cannot be read: give another folder") from error
        differing = sorted(name for name in {*before, *asked} if before.get(name) != asked.get(name))
        if differing:
            name = differing[0]
            raise InputError(
                f"{self.path} holds relaxations with {name} {before.get(name)!r}, not {asked.get(name)!r}: "
                "give another folder"
            )

    def _read(self, file: IO[bytes]) -> tuple[list[Row], int]:
        """Whole lines, and where the last one ends."""
        rows: list[Row] = []
        file.seek(0)
        end = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not all(
                    isinstance(row.get(key), kind) for key, kind in self._keys.items()
                ):
                    raise ValueError("no line of a relaxation")
            except ValueError as error:
                raise InputError(
                    f"{self.file}, line {number} is damaged: remove the line to relax that structure again"
                ) from error
            rows.append(row)
            end += len(line)
        return rows, end


def is_plain_name(name: str) -> bool:
    """Tell whether a file can have this name."""
    return (
        bool(name)
        and Path(name).name == name
        and not name.startswith(".")
        and name.isprintable()
        and len(name.encode()) <= _LONGEST_NAME
    )


def append_line(file: IO[bytes], row: Row) -> None:
    """Append a line of JSON; it is on the disk when this returns."""
    file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())

"""Reading structures that users give and writing files that are never half there."""

import json
import os
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import read
from ase.io.formats import filetype

from equiformer2.errors import InputError


def read_structure(path: str | Path, index: int = -1) -> Atoms:
    """One structure from any file ASE can read (`index` of a trajectory, last by default).

    Raises:
        InputError: not a structure file, or no such frame.
        OSError: missing or unreadable.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a structure file")
    with path.open("rb"):  # a missing file is named before ASE guesses at formats
        pass
    try:
        # Databases and network addresses are no structure files; everything else ASE parses as data.
        if filetype(str(path)) in {"db", "mysql", "postgresql"}:
            raise InputError(f"{path} is a database: export the structure to a file first")
        # "@" in a name is ASE's frame syntax; do_not_split_by_at_sign takes the name as it is.
        atoms = read(path, index=index, do_not_split_by_at_sign=True)
    except InputError:
        raise
    except Exception as error:  # each of ASE's many parsers fails in its own way
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's own; some parsers call a wrong format an OSError too
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: no structure could be read at index {index} ({reason})") from error
    if not isinstance(atoms, Atoms):
        raise InputError(f"{path}: index {index} is not a single structure")
    return atoms


def write_atomically(path: str | Path, content: bytes) -> Path:
    """Write `content` to `path` whole or not at all (temporary file in the same folder, fsync, rename)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return path


def write_json(path: str | Path, record: dict[str, Any]) -> Path:
    """Write `record` as indented JSON, atomically; non-finite numbers are refused."""
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
    return write_atomically(path, (text + "\n").encode())

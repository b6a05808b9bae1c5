"""Reading structures that users give: the content of a file is data, and what it claims is not believed."""

import bz2
import errno
import io
import json
import math
import mmap
import os
import re
from pathlib import Path
from typing import IO, Any

from ase import Atoms
from ase.io import read
from ase.io.formats import filetype, ioformats

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import load_json, open_compressed, open_regular
from equiformer2.errors import InputError

MAX_FILE = 1 << 30
"""Most bytes of a file of structures."""
MAX_UNPACKED = 1 << 28
"""Most bytes that a compressed file may hold; it is unpacked into memory."""
_MOST_READS_AT_END = 1000
_COUNT_LINES = {
    "extxyz": (0,),
    "xyz": (0,),
    "gen": (0,),
    "gromacs": (1,),
    "vasp": (5, 6),
    "vasp-xdatcar": (5, 6),
}
_COUNTS = re.compile(rb"\s*(\d+(?:[ \t]+\d+)*)(?:\s+[A-Z])?\s*$")
_NO_STRUCTURE = {
    "db": "a database",
    "mysql": "a database",
    "postgresql": "a database",
    "gpw": "a restart file of another program",
}
_ESCAPED = re.compile(rb"\\u00[2-7]")
_ARRAY = re.compile(rb'_ndarray__"\s*:\s*\[\s*\[([\d\s,]*)\]')


def read_structure(path: str | Path, index: int = -1) -> Atoms:
    """One structure from any file ASE can read (`index` of a trajectory, last by default).

    None of ASE's readers of files runs what a file contains; databases, addresses in the network and restart
    files of programs are refused. A number of atoms that the file cannot hold costs neither time nor memory.

    Raises:
        InputError: not a structure file, no such frame, a pipe, device or folder, more than `MAX_FILE` bytes,
            fewer atoms than it says.
        OSError: missing or unreadable.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder: give a structure file")
        # A missing or unreadable file is named before ASE guesses at formats.
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE:
                raise InputError(f"{path} has more than {MAX_FILE >> 20} MiB: give a smaller file")
        atoms = _read(path, index)
    except DataError as error:
        raise InputError(str(error)) from error
    except InputError:
        raise
    except Exception as error:  # each of ASE's many parsers fails in its own way
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the file system's own; some parsers call a wrong format an OSError too
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{path}: no structure could be read at index {index} ({reason})") from error
    if not isinstance(atoms, Atoms):
        raise InputError(f"{path}: index {index} is not a single structure")
    if len(atoms) == 0:
        raise InputError(f"{path}: the structure at index {index} has no atoms")
    return atoms


def _read(path: Path, index: int) -> Any:
    format_ = filetype(str(path))
    if format_ in _NO_STRUCTURE:
        raise InputError(f"{path} is {_NO_STRUCTURE[format_]}: export the structure to a file first")
    how = ioformats.get(format_)
    if how is None or not how.acceptsfd:
        # "@" in a name is ASE's frame syntax; do_not_split_by_at_sign takes the name as it is.
        return _frame(path, index, path, format=format_, do_not_split_by_at_sign=True)
    with _opened(path) as file:
        if format_ in ("json", "traj"):
            _check_arrays(path, file, format_)
        claimed = _claimed(path, file, format_)
        given = file if how.isbinary else _Text(path, file)
        atoms = _frame(path, index, given, format=format_)
    if format_ in ("gen", "gromacs") and claimed != len(atoms):
        raise InputError(f"{path} says that it holds {claimed} atoms and holds {len(atoms)}: it is truncated")
    return atoms


def _frame(path: Path, index: int, given: Any, **options: Any) -> Any:
    """One frame; of those from the end ASE gives the first where there are fewer."""
    if index >= -1:
        try:
            return read(given, index=index, **options)
        except StopIteration:  # ASE's word for no frame from there on
            raise ValueError("the file has no such frame") from None
    frames = read(given, index=slice(index, None), **options)
    if len(frames) < -index:
        raise ValueError("the file has no such frame")
    return frames[0]


def _opened(path: Path) -> IO[bytes]:
    """The content, unpacked where the name says that it is compressed; it can be sought in."""
    if path.suffix in (".gz", ".xz"):
        with open_compressed(path, MAX_UNPACKED) as packed:
            return io.BytesIO(packed.read())
    if path.suffix == ".bz2":
        with open_regular(path) as file, bz2.open(file) as unpacked:
            content = unpacked.read(MAX_UNPACKED + 1)
        if len(content) > MAX_UNPACKED:
            raise InputError(f"{path} unpacks to more than {MAX_UNPACKED >> 20} MiB: give a smaller file")
        return io.BytesIO(content)
    return open_regular(path)


class _Text(io.TextIOWrapper):
    """Text that stops a parser which reads on behind the end, for atoms that it was promised."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._at_end = 0

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        return self._counted(super().readline(size))

    def read(self, size: int | None = -1, /) -> str:
        return self._counted(super().read(size))

    def _counted(self, text: str) -> str:
        self._at_end += not text
        if self._at_end > _MOST_READS_AT_END:
            raise InputError(f"{self._path} is truncated, or holds fewer atoms than it says: export it again")
        return text


def _claimed(path: Path, file: IO[bytes], format_: str) -> int | None:
    """The number of atoms in the head of a file, None for formats that have none in a place of its own."""
    if format_ not in _COUNT_LINES:
        return None
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = [file.readline(1 << 16) for _ in range(max(_COUNT_LINES[format_]) + 1)]
    file.seek(0)
    for number in _COUNT_LINES[format_]:
        found = _COUNTS.match(head[number])
        if found is None:
            continue
        words = found[1].split()
        claimed = sum(int(word[:30]) for word in words)
        # The line of an atom has at least a symbol and an end.
        if 2 * claimed > size:
            raise InputError(
                f"{path} says that it holds {claimed} atoms, too many for its {size} bytes: "
                "it is truncated or damaged; export it again"
            )
        return claimed
    return None


def _check_arrays(path: Path, file: IO[bytes], format_: str) -> None:
    """Refuse arrays whose shapes claim more numbers than the file has bytes: ASE would fill them."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    content: Any
    if format_ == "json":  # written anew, names are without escapes
        content = json.dumps(load_json(file.read(), str(path), limit=MAX_FILE, nonfinite=True)).encode()
    elif isinstance(file, io.BytesIO):
        content = file.getvalue()
    else:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.seek(0)
    if format_ == "traj" and _ESCAPED.search(content):
        raise InputError(f"{path} hides names behind escapes, which ASE does not write: export it again")
    for found in _ARRAY.finditer(content):
        shape = [int(length[:30]) for length in found[1].split(b",") if length.strip()]
        if math.prod(shape) > size:
            raise InputError(
                f"{path} holds an array that claims the shape {shape}, more than its {size} bytes"
            )

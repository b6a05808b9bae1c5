"""Reading structures that users give: the content of a file is data, and what it claims is not believed."""

import errno
import io
import json
import math
import mmap
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

from ase import Atoms
from ase.io import read
from ase.io.formats import filetype, ioformats

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import load_json, open_compressed, open_regular

MAX_FILE = 1 << 30
"""Most bytes of a file of structures."""
MAX_UNPACKED = 1 << 28
"""Most bytes that a compressed file may hold; it is unpacked into memory."""
COMPRESSED = (".gz", ".bz2", ".xz")
"""Endings of compressed files that are unpacked."""
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
        DataError: not a structure file, no such frame, a pipe, device or folder, more than `MAX_FILE` bytes,
            fewer atoms than it says.
        OSError: missing or unreadable.
    """
    path = Path(path)
    try:
        check_file(path)
        atoms = _read(path, index)
    except DataError:
        raise
    except Exception as error:  # each of ASE's many parsers fails in its own way
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the file system's own; some parsers call a wrong format an OSError too
        raise DataError(
            f"{path}: no structure could be read at index {index} ({reason_of(error)})"
        ) from error
    if not isinstance(atoms, Atoms):
        raise DataError(f"{path}: index {index} is not a single structure")
    if len(atoms) == 0:
        raise DataError(f"{path}: the structure at index {index} has no atoms")
    return atoms


def check_file(path: Path, limit: int | None = MAX_FILE) -> None:
    """Check that `path` is a file of at most `limit` bytes, before ASE guesses at its format.

    Raises:
        DataError: a folder, pipe or device, or more bytes.
        OSError: missing or unreadable.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a structure file")
    with open_regular(path) as file:
        if limit is not None and os.fstat(file.fileno()).st_size > limit:
            raise DataError(f"{path} has more than {limit >> 20} MiB: give a smaller file")


def reason_of(error: Exception) -> str:
    """Return what a parser says about a fault, in one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, KeyError) and len(text) <= 5:  # in quotes: how ASE says that a symbol is unknown
        return f"there is no element {text}"
    if isinstance(error, KeyError | IndexError | UnicodeDecodeError) or not text:
        return f"{type(error).__name__} {text}".strip()
    return text


def _read(path: Path, index: int) -> Any:
    format_ = filetype(str(path))
    if format_ in _NO_STRUCTURE:
        raise DataError(f"{path} is {_NO_STRUCTURE[format_]}: export the structure to a file first")
    how = ioformats.get(format_)
    if how is None or not how.acceptsfd:
        # "@" in a name is ASE's frame syntax; do_not_split_by_at_sign takes the name as it is.
        return _frame(path, index, path, format=format_, do_not_split_by_at_sign=True)
    with open_content(path) as file:
        claimed = check_claims(path, file, format_)
        given = file if how.isbinary else GuardedText(path, file)
        atoms = _frame(path, index, given, format=format_)
    if format_ in ("gen", "gromacs") and claimed != len(atoms):
        raise DataError(f"{path} says that it holds {claimed} atoms and holds {len(atoms)}: it is truncated")
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


def open_content(path: Path, limit: int = MAX_UNPACKED) -> IO[bytes]:
    """Open the content of a file, unpacked where the name says that it is compressed; it can be sought in.

    Args:
        path: the file.
        limit: most bytes that a compressed file may hold; what exceeds `MAX_UNPACKED` is unpacked to the
            disk.

    Raises:
        DataError: more bytes, or a compressed file that is damaged or truncated.
        OSError: missing or unreadable.
    """
    if path.suffix not in COMPRESSED:
        return open_regular(path)
    unpacked: Any = tempfile.SpooledTemporaryFile(max_size=MAX_UNPACKED)  # noqa: SIM115
    try:
        with open_compressed(path, limit) as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        unpacked.seek(0)
    except BaseException:
        unpacked.close()
        raise
    return unpacked  # type: ignore[no-any-return]


class GuardedText(io.TextIOWrapper):
    """Text that stops a parser which reads on behind the end, for atoms that it was promised.

    Bytes that are not UTF-8, as in a title that was written in Latin-1, become replacement characters:
    numbers and elements are ASCII in all formats.

    Args:
        path: the file, for messages.
        file: its content.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._path = path
        self._at_end = 0

    @property
    def name(self) -> str:
        """Name in a folder that does not exist: ASE would read files beside it, without the checks here."""
        return f"{os.devnull}/{self._path.name}"

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        """Return a line; a parser that goes on reading at the end is stopped."""
        return self._counted(super().readline(size))

    def read(self, size: int | None = -1, /) -> str:
        """Return text; a parser that goes on reading at the end is stopped."""
        return self._counted(super().read(size))

    def _counted(self, text: str) -> str:
        self._at_end += not text
        if self._at_end > _MOST_READS_AT_END:
            raise DataError(f"{self._path} is truncated, or holds fewer atoms than it says: export it again")
        return text


def check_claims(path: Path, file: IO[bytes], format_: str) -> int | None:
    """Check the sizes that a file claims against its bytes.

    Args:
        path: the file, for messages.
        file: its content, which is read from the beginning again afterwards.
        format_: its format, by ASE's name.

    Returns:
        Number of atoms in the head of the file, None for formats that have none in a place of its own.

    Raises:
        DataError: more atoms or larger arrays than the file can hold.
    """
    if format_ in ("json", "traj"):
        _check_arrays(path, file, format_)
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
            raise DataError(
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
    elif path.suffix in COMPRESSED and size <= MAX_UNPACKED:  # in memory
        content = file.read()
    else:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.seek(0)
    if format_ == "traj" and _ESCAPED.search(content):
        raise DataError(f"{path} hides names behind escapes, which ASE does not write: export it again")
    for found in _ARRAY.finditer(content):
        shape = [int(length[:30]) for length in found[1].split(b",") if length.strip()]
        if math.prod(shape) > size:
            raise DataError(
                f"{path} holds an array that claims the shape {shape}, more than its {size} bytes"
            )

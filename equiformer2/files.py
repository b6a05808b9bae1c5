"""Write files atomically, and check targets before long work."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets_oc20 import untrusted
from datasets_oc20.atomic import whole_file, write_bytes
from datasets_oc20.errors import DataError
from equiformer2.errors import InputError

__all__ = ["as_input_error", "check_target", "read_json", "whole_file", "write_bytes", "write_json"]

_DATA = (
    *(".lmdb", ".aselmdb", ".mdb", ".extxyz", ".xyz", ".xz", ".gz", ".bz2", ".txt", ".db", ".traj", ".out"),
    *(".pwo", ".xml", "OUTCAR", ".pt", ".ckpt", ".npz", ".safetensors"),
)


def check_target(
    path: str | os.PathLike[str],
    is_folder: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = True,
) -> None:
    """Check before long work that its result can be written to `path`.

    Missing folders on the way are not made yet.

    Args:
        path: path of a file, or of a folder for several files.
        is_folder: `path` is a folder.
        inputs: files and folders that are read, which no result replaces, under whatever name or link.
        overwrite: replace an earlier result; False for a command that neither continues it nor was told to.

    Raises:
        InputError: `path` is a folder where it must be a file, something on the way to it is no folder, the
            folder is not writable, `path` is an input, or a file is there already and not to be replaced.
    """
    path = Path(path)
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} is not a possible file name: choose another")
    if path.is_dir() and not is_folder:
        raise InputError(f"{path} is a folder: name a file to write")
    folder = path if is_folder else path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{path} cannot be written, because {folder} is no folder: choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written, because {folder} is not writable: choose another place")
    if is_folder:
        return

    def behind_links(name: Path) -> str:
        return str(name) if "\0" in str(name) else os.path.realpath(name)

    def is_input(given: Path) -> bool:
        """Tell whether `path` is this file, or a file of data in this folder."""
        if given.is_dir():
            inside = Path(behind_links(given)) in Path(behind_links(path)).parents
            return path.exists() and path.name.endswith(_DATA) and inside
        if path.exists() and given.exists():
            return path.samefile(given)
        return behind_links(path) == behind_links(given)

    same = next((given for given in inputs if is_input(Path(given))), None)
    if same is not None:
        raise InputError(
            f"{path} is read as input ({same}) and would be replaced: give another name to --out"
        )
    if not overwrite and os.path.lexists(path):
        raise InputError(f"{path} exists already: give another name, or --overwrite to replace it")


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any], make_folder: bool = False) -> Path:
    """Write `record` as indented JSON, atomically.

    Raises:
        InputError: a number is not finite, which JSON cannot hold.
        OSError: the folder is missing or not writable, or the disk is full; `path` is named.
    """
    try:
        text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise InputError(f"{path} was not written, because a number in it is not finite") from error
    # Bytes of file names that are no UTF-8 are in Python's text as lone surrogates; they become `\\xdf`.
    text = re.sub("[\udc80-\udcff]", lambda found: f"\\\\x{ord(found[0]) - 0xDC00:02x}", text)
    return write_bytes(path, (text + "\n").encode(), make_folder)


@contextmanager
def as_input_error() -> Iterator[None]:
    """Turn a `DataError` about a file into an `InputError` inside the context."""
    try:
        yield
    except DataError as error:
        raise InputError(str(error)) from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote.

    Raises:
        InputError: it is something else.
        OSError: the file is missing or unreadable.
    """
    try:
        content = untrusted.read_json(path)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ").rstrip(".")
        raise InputError(
            f"{path} is broken ({reason}): remove it, and what it told is computed again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is broken (no JSON object): remove it, and what it told is computed again")
    return content

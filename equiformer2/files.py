"""Writing files that appear whole or not at all."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets_oc20 import untrusted
from datasets_oc20.atomic import whole_file, write_bytes
from datasets_oc20.errors import DataError
from equiformer2.errors import InputError

__all__ = ["as_input_error", "check_target", "read_json", "whole_file", "write_bytes", "write_json"]

_DATA = (".lmdb", ".aselmdb", ".mdb", ".extxyz", ".xz", ".txt", ".db", ".traj", ".pt", ".ckpt", ".npz")


def check_target(
    path: str | os.PathLike[str],
    is_folder: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = True,
) -> None:
    """Say before long work what would keep its result from being written to `path`.

    Missing folders on the way are not made yet.

    Args:
        path: of a file, or of a folder for several files if `is_folder`.
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
    same = next((given for given in inputs if _is_input(path, Path(given))), None)
    if same is not None:
        raise InputError(
            f"{path} is read as input ({same}) and would be replaced: give another name to --out"
        )
    if not overwrite and os.path.lexists(path):
        raise InputError(f"{path} exists already: give another name, or --overwrite to replace it")


def _is_input(path: Path, given: Path) -> bool:
    """Tell whether both are one file, or `path` is a file of data in the folder `given`."""
    if given.is_dir():
        return path.exists() and path.name.endswith(_DATA) and Path(_real(given)) in Path(_real(path)).parents
    if path.exists() and given.exists():
        return path.samefile(given)
    return _real(path) == _real(given)


def _real(path: Path) -> str:
    """The name behind links, also where they lead in a circle."""
    return str(path) if "\0" in str(path) else os.path.realpath(path)


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any], make_folder: bool = False) -> Path:
    """Write `record` as indented JSON, whole or not at all.

    Raises:
        InputError: a number is not finite, which JSON cannot hold.
        OSError: the folder is missing or not writable, or the disk is full; `path` is named.
    """
    try:
        text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise InputError(f"{path} was not written, because a number in it is not finite") from error
    return write_bytes(path, (text + "\n").encode(), make_folder)


@contextmanager
def as_input_error() -> Iterator[None]:
    """Inside, what `datasets_oc20` says of a file is an `InputError`, as all else about it."""
    try:
        yield
    except DataError as error:
        raise InputError(str(error)) from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        InputError: it is something else.
        OSError: the file is missing or unreadable.
    """
    try:
        content = untrusted.read_json(path)
    except DataError as error:
        raise InputError(
            f"{path} is broken ({error}): remove it, and what it told is computed again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is broken (no JSON object): remove it, and what it told is computed again")
    return content

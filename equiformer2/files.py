"""Writing files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets_oc20 import untrusted
from datasets_oc20.atomic import whole_file, write_bytes
from datasets_oc20.errors import DataError
from equiformer2.errors import InputError

__all__ = ["as_input_error", "check_target", "read_json", "whole_file", "write_bytes", "write_json"]


def check_target(path: str | os.PathLike[str], is_folder: bool = False) -> None:
    """Say before long work what would keep its result from being written to `path`.

    Missing folders on the way are not made yet.

    Args:
        path: of a file, or of a folder for several files if `is_folder`.

    Raises:
        InputError: `path` is a folder where it must be a file, something on the way to it is no folder, or
            the folder is not writable.
    """
    path = Path(path)
    if path.is_dir() and not is_folder:
        raise InputError(f"{path} is a folder: name a file to write")
    folder = path if is_folder else path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{path} cannot be written, because {folder} is no folder: choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written, because {folder} is not writable: choose another place")


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

"""Files of `torch.save` as data: read without running anything they contain, write whole or not at all."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equiformer2.errors import InputError
from equiformer2.files import whole_file

# Metrics of old OCP files are numpy scalars. The pickles name the function by the module of the numpy
# that wrote them, so each name is allowed for exactly this one function.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED: list[Any] = [
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
]


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary stored in a `torch.save` file, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file is not one of `torch.save`, is truncated, needs an object other than
            tensors and plain values, or holds something other than a dictionary.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a checkpoint file")
    with path.open("rb") as file:
        if not file.read(1):
            raise InputError(f"{path} is empty: it is not a checkpoint")
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            # Only a remark about files that another pickle protocol wrote; what matters is raised.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(_why_refused(path, str(error))) from None
    except (
        zipfile.BadZipFile,
        OSError,
        struct.error,
        zlib.error,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        AssertionError,
    ) as error:
        # The readers of torch's two file formats raise any of these on broken bytes.
        raise InputError(f"{path} is truncated, damaged or not a checkpoint, and cannot be read") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _check_sums(path: Path) -> None:
    """Compare the CRC-32 of every record: torch.load does not, and a flipped bit is a wrong number."""
    if zipfile.is_zipfile(path):  # torch's old format has no sums
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile


def _why_refused(path: Path, message: str) -> str:
    found = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) (\S+)", message)
    if found:
        return (
            f"{path} contains the Python object {found.group(1)}, which could run code and is refused: "
            "only tensors and plain values are read"
        )
    return f"{path} is damaged or not a checkpoint: only tensors and plain values are read"


def write_tensors(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """`torch.save` that leaves either the whole new file or the old state.

    Raises:
        OSError: if the folder is missing or not writable, or the disk is full.
    """
    with whole_file(path) as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:
            # torch's zip writer turns a failed write (a full disk) into a RuntimeError.
            raise OSError(f"could not write {path}: {error.__context__ or error}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """A copy made of dict, list, str, int, float, bool and None alone; anything else as its text.

    Recorded configurations go through this, so that a native file holds nothing but plain values.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, torch.Tensor):
        return plain(value.tolist()) if value.numel() <= 16 else f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)

"""Files of `torch.save`: read without executing anything in them, and written atomically."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets_oc20.untrusted import open_regular
from equiformer2.devices import own_defaults
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, whole_file
from equiformer2.values import check_size, shown

# Metrics of old OCP files are numpy scalars. The pickles name the function by the module of the numpy
# that wrote them, so each name is allowed for exactly this one function.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED: list[Any] = [
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
]
_MAX_PICKLE = 16 << 20
"""Maximum bytes of the pickle with the names of the tensors; 2 MB in the largest public file."""


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the dictionary in a `torch.save` file to the CPU; nothing in the file is executed.

    All tensors in it are ordinary: dense, with numbers, none with more numbers than the file has.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file is not one of `torch.save`, is truncated, needs an object other than
            tensors and plain values, claims more than it holds, or holds something other than a dictionary.
    """
    path = Path(path)
    with as_input_error(), open_regular(path) as file:
        if not file.read(1):
            raise InputError(f"{path} is empty: it is not a checkpoint")
        size = os.fstat(file.fileno()).st_size
    try:
        _check_archive(path, size)
        with (
            own_defaults(),
            torch.serialization.safe_globals(_ALLOWED),
            warnings.catch_warnings(),
        ):
            # Warnings about other pickle protocols, and about kinds of tensors that are refused below.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) (\S+)", str(error))
        problem = "is damaged or not a checkpoint"
        if refused:
            problem = f"contains the Python object {refused.group(1)}, which could run code and is refused"
        raise InputError(f"{path} {problem}: only tensors and plain values are read") from None
    except Exception as error:  # on broken bytes the readers of torch's two file formats raise anything
        raise InputError(f"{path} is truncated, damaged or not a checkpoint, and cannot be read") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    check_size(content, str(path))
    _check_tensors(content, path, size)
    return content


def _check_archive(path: Path, size: int) -> None:
    """Check, before torch.load, that records are no larger than the file, and whole.

    torch.save compresses nothing, so records that unpack to more than the file are a bomb; and a flipped bit,
    which the CRC-32 of its record shows, is a wrong number.
    """
    if not zipfile.is_zipfile(path):  # torch's old format has no records and no sums
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) != len(records):
            raise InputError(f"{path} holds two records of one name, which torch.save does not write")
        if (
            any(record.compress_type != zipfile.ZIP_STORED for record in records)
            or sum(record.file_size for record in records) > size
        ):
            raise InputError(
                f"{path} is compressed, which torch.save does not do: unpack it, or load it with torch and "
                "save it again"
            )
        if any(r.filename.endswith("data.pkl") and r.file_size > _MAX_PICKLE for r in records):
            raise InputError(
                f"{path} has more than {_MAX_PICKLE} bytes beside its tensors, which no checkpoint has"
            )
        if archive.testzip() is not None:
            raise zipfile.BadZipFile


def _check_tensors(content: Any, path: Path, size: int) -> None:
    """Refuse tensors that are more than their numbers in the file.

    Raises:
        InputError: naming the place of the tensor.
    """

    def unusual_kind(tensor: torch.Tensor) -> str | None:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"a {type(tensor).__name__}"
        if tensor.is_meta:
            return "a meta tensor, which has a shape and no numbers"
        if tensor.is_nested:
            return "a nested tensor"
        if tensor.layout != torch.strided:
            return f"a sparse tensor ({str(tensor.layout).removeprefix('torch.')})"
        if tensor.is_quantized:
            return f"quantised ({str(tensor.dtype).removeprefix('torch.')})"
        return None

    sizes: dict[int, int] = {}  # bytes by storage
    pending = [(content, "")]
    while pending:
        item, place = pending.pop()
        if isinstance(item, torch.Tensor):
            kind = unusual_kind(item)
            if kind is not None:
                raise InputError(
                    f"{path}: {place} is {kind}; only dense tensors that hold their numbers are read"
                )
            storage = item.untyped_storage()
            if item.numel() * item.element_size() > storage.nbytes():
                raise InputError(
                    f"{path}: {place} repeats {storage.nbytes()} bytes to the shape "
                    f"{shown(tuple(item.shape))}; only dense tensors that hold their numbers are read"
                )
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            pending += [
                (value, f"{place}[{shown(key)}]" if place else shown(key)) for key, value in item.items()
            ]
        elif isinstance(item, list | tuple | set | frozenset):
            pending += [(value, f"{place}[{index}]") for index, value in enumerate(item)]
    if sum(sizes.values()) > size:
        raise InputError(f"{path}: its tensors are larger than the file: it is no checkpoint")


def write_tensors(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a dictionary with `torch.save`, atomically.

    Args:
        path: the file.
        content: tensors and plain values by name.

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
    """Compute the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """Copy a value to dict, list, str, int, float, bool and None alone; anything else becomes text.

    Recorded configurations go through this, so that a native file holds nothing but plain values, which JSON
    can hold, too: numbers that are not finite, whole numbers beyond 64 bits and text that is no Unicode
    become text.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else shown(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, torch.Tensor):
        return plain(value.tolist()) if value.numel() <= 16 else f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return plain(str(value))

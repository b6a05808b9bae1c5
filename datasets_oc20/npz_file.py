"""Reader of `.npz` files that may be truncated, damaged, hostile or something else."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import IO

import numpy as np

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import open_regular

MAX_BYTES = 16 << 30
"""Maximum bytes of the arrays of one file."""


def read_npz(path: str | os.PathLike[str], names: Sequence[str]) -> list[np.ndarray]:
    """Read the arrays with these names; nothing in the file is run.

    Args:
        path: the file.
        names: names of the arrays.

    Returns:
        The arrays in the order of `names`.

    Raises:
        DataError: not an `.npz` file, not a whole one, one without such an array, or one that claims what it
            does not hold.
        OSError: the file is missing or unreadable.
    """
    with open_regular(path) as handle:
        check_npz(handle, path)
        try:
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with file:
                return [file[name] for name in names]
        except (
            ValueError,
            KeyError,
            EOFError,
            OSError,
            NotImplementedError,
            MemoryError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            listed = " and ".join(repr(name) for name in names)
            raise DataError(f"{path}: not a whole .npz file with an array {listed}.") from error


def check_npz(handle: IO[bytes], path: str | os.PathLike[str]) -> None:
    """Compare the shape that every member claims with its bytes, before memory is allocated for it.

    Files that are no zip archives pass; reading them fails.

    Args:
        handle: the open file; read from its beginning, where it is left.
        path: names the file in errors.

    Raises:
        DataError: an encrypted member, a shape that the bytes do not fill, or more than MAX_BYTES.
    """

    def check_shape(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            count = 1
            for size in shape:
                count *= size  # Python's numbers do not overflow
            if not dtype.hasobject and (
                min(shape, default=1) < 0 or count * dtype.itemsize > member.file_size - file.tell()
            ):
                raise DataError(
                    f"{path}: {member.filename} claims the shape {list(shape)}, for which it has too few "
                    "bytes."
                )

    try:
        if not zipfile.is_zipfile(handle):
            return
        with zipfile.ZipFile(handle) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise DataError(f"{path}: unpacks to more than {MAX_BYTES >> 30} GiB; is it an .npz file?")
            for member in members:
                if member.flag_bits & 1:
                    raise DataError(f"{path}: {member.filename} is encrypted; save it without a password.")
                check_shape(archive, member)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a whole .npz file ({error}).") from error
    finally:
        handle.seek(0)

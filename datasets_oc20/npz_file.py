"""Reading `.npz` files, which may be truncated, damaged or something else."""

import os
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from datasets_oc20.errors import DataError


def read_npz(path: str | os.PathLike[str], names: Sequence[str]) -> list[np.ndarray]:
    """The arrays with these names; nothing in the file is run.

    Raises:
        DataError: not an `.npz` file, not a whole one, or one without such an array.
        OSError: the file is missing or unreadable.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            return [file[name] for name in names]
    except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        wanted = " and ".join(repr(name) for name in names)
        raise DataError(f"{path}: not a whole .npz file with an array {wanted}.") from error

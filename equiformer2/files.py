"""Writing files that appear whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets_oc20.atomic import whole_file, write_bytes
from equiformer2.errors import InputError

__all__ = ["whole_file", "write_bytes", "write_json"]


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

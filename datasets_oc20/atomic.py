"""Files that appear whole or not at all."""

import contextlib
import os
from pathlib import Path


def temporary_beside(path: Path) -> Path:
    """A name in the folder of `path` for a file that will be renamed to it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Flush `temporary` to the disk and rename it to `path`."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()

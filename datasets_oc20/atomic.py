"""Atomic writes: a temporary file in the same folder, fsync, rename."""

import contextlib
import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# Another machine that writes to the same folder has other processes under the same numbers.
_HOST = re.sub(r"[^\w]", "", socket.gethostname())[:16] or "host"


def temporary_beside(path: Path) -> Path:
    """Return a name in the folder of `path` for a file that will be renamed to it."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")


def remove_stale(path: Path) -> None:
    """Remove temporary files and folders of `path` that killed processes of this machine left."""

    def is_alive(process: int) -> bool:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except OSError:  # it is of another user
            return True
        return True

    for stale in path.parent.glob(f".{glob.escape(path.name)}.{_HOST}-*.tmp"):
        process = stale.name.removesuffix(".tmp").rpartition("-")[2]
        if process.isdigit() and not is_alive(int(process)):
            with contextlib.suppress(OSError):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def publish(temporary: Path, path: Path) -> None:
    """Flush `temporary` to the disk and rename it to `path`.

    Raises:
        OSError: the disk is full or the folder not writable; `path` is named.
    """
    with _naming_errors(path, temporary):
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes the name `path` when the block ends without an exception.

    Otherwise `path` stays as it was, and nothing is left.

    Yields:
        The open temporary file.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is named.
    """
    path = Path(path)
    remove_stale(path)
    temporary = temporary_beside(path)
    with _naming_errors(path, temporary):
        try:
            with temporary.open("wb") as file:
                yield file
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: str | os.PathLike[str], content: bytes, make_folder: bool = False) -> Path:
    """Write a file, or leave it as it was.

    Args:
        path: the file.
        content: its bytes.
        make_folder: make missing folders on the way.

    Returns:
        `path`.

    Raises:
        OSError: as `whole_file`.
    """
    path = Path(path)
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content)
    return path


@contextlib.contextmanager
def _naming_errors(path: Path, temporary: Path) -> Iterator[None]:
    """Make errors name `path`: a full disk names no file, others the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error

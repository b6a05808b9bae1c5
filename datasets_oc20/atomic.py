"""Files that appear whole or not at all: a temporary file in the same folder, fsync, rename."""

import contextlib
import glob
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# Another machine that writes to the same folder has other processes under the same numbers.
_HOST = re.sub(r"[^\w]", "", socket.gethostname())[:16] or "host"


def temporary_beside(path: Path) -> Path:
    """A name in the folder of `path` for a file that will be renamed to it."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")


def remove_stale(path: Path) -> None:
    """Remove what killed processes of this machine left of `path`; those that live keep theirs."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.{_HOST}-*.tmp"):
        process = stale.name.removesuffix(".tmp").rpartition("-")[2]
        if process.isdigit() and not _lives(int(process)):
            with contextlib.suppress(OSError):
                stale.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is of another user
        return True
    return True


def publish(temporary: Path, path: Path) -> None:
    """Flush `temporary` to the disk and rename it to `path`.

    Raises:
        OSError: naming `path`.
    """
    with _errors_name(path, temporary):
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write that takes the name `path` when the block ends without an exception.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is named.
    """
    path = Path(path)
    remove_stale(path)
    temporary = temporary_beside(path)
    with _errors_name(path, temporary):
        try:
            with temporary.open("wb") as file:
                yield file
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: str | os.PathLike[str], content: bytes, make_folder: bool = False) -> Path:
    """Write `content` to `path`; its folder must exist unless `make_folder`.

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
def _errors_name(path: Path, temporary: Path) -> Iterator[None]:
    """Make errors name `path`: a full disk names no file, others the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error

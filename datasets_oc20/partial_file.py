"""Downloads in progress: `NAME.part` beside the target, and its origin in `NAME.part.json`.

The second file is written first, so a `.part` without it was not made here, and is left alone.
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import orjson

from datasets_oc20.atomic import publish, write_bytes
from datasets_oc20.disk_space import byte_bar
from datasets_oc20.errors import DataError
from datasets_oc20.locking import exclusive
from datasets_oc20.untrusted import AnyPath, read_json

_CHUNK = 1 << 20


def md5_sum(path: AnyPath, show_progress: bool = False) -> str:
    """Compute the MD5 sum of a file, hexadecimal; `show_progress` draws a bar on stderr."""
    path = Path(path)
    digest = hashlib.md5(usedforsecurity=False)
    with (
        path.open("rb") as file,
        byte_bar(f"Checking {path.name}", path.stat().st_size, show=show_progress) as bar,
    ):
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


class PartialFile:
    """The received part of a download, locked and open for appending inside a `with` block.

    Args:
        target: name of the complete file.
        url: address of the download.

    Attributes:
        target: name of the complete file.
        path: file of the received bytes.
        size: bytes received.
        total: bytes of the complete file; None while unknown.
        validator: the server's name of this version of the file (ETag or Last-Modified); None while unknown.

    Raises:
        DataError: on entering: a `.part` that was not made here, or one that another process is writing.
    """

    def __init__(self, target: AnyPath, url: str) -> None:
        target = Path(target)
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self.url = url
        self.size = 0
        self.total: int | None = None
        self.validator: str | None = None
        self._note = target.with_name(target.name + ".part.json")
        self._lock_file = target.with_name(target.name + ".part.lock")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        known = self._read_note()
        if known is None and self.path.exists():
            raise DataError(
                f"{self.path}: was not made by this program ({self._note.name} is missing); move it away and "
                "run again."
            )
        if known is None:
            self._write_note()
        self._lock = exclusive(self._lock_file, self.path)
        self._file = self.path.open("ab")
        self.size = self._file.tell()
        if known is not None and known["url"] == self.url:
            self.total, self.validator = known["total"], known["validator"]
        else:
            self.restart()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()
        self._lock.__exit__(kind, error, trace)

    def is_complete(self, md5: str | None, show_progress: bool = False) -> bool:
        """Tell whether the target is there already, with the right sum; may be called outside the block.

        Args:
            md5: hexadecimal MD5 sum; None if unknown.
            show_progress: draw a bar on stderr while the sum is computed.

        Raises:
            DataError: it is no file or has another sum. It is left alone: the user may have put it there.
        """
        if not os.path.lexists(self.target):
            return False
        if not self.target.is_file():
            raise DataError(f"{self.target}: is there already and is not a file; move it away and run again.")
        actual = md5_sum(self.target, show_progress) if md5 else None
        if actual != md5:
            raise DataError(
                f"{self.target}: is there already, but its MD5 sum is {actual} instead of {md5}; it was left "
                "alone: move it away and run again."
            )
        return True

    def write(self, chunk: bytes) -> None:
        """Append received bytes."""
        self._handle.write(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        """Discard the received bytes and begin again."""
        self._handle.truncate(0)
        self.size, self.total, self.validator = 0, None, None
        self._write_note()

    def describe(self, total: int | None, validator: str | None) -> None:
        """Record the size (bytes) and the version of the complete file."""
        if (total, validator) != (self.total, self.validator):
            self.total, self.validator = total, validator
            self._write_note()

    def complete(self) -> None:
        """Rename the part to the target."""
        self._handle.close()
        publish(self.path, self.target)
        self._note.unlink(missing_ok=True)
        self._lock_file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the part and its note."""
        self._handle.close()
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self._lock_file.unlink(missing_ok=True)

    @property
    def _handle(self) -> IO[bytes]:
        assert self._file is not None, "use PartialFile in a with block"
        return self._file

    def _read_note(self) -> dict[str, Any] | None:
        try:
            known = read_json(self._note)
        except FileNotFoundError:
            return None
        except DataError as error:
            raise DataError(f"{self._note}: is not readable; move it and {self.path.name} away.") from error
        if not isinstance(known, dict) or not {"url", "total", "validator"} <= known.keys():
            raise DataError(f"{self._note}: was not made by this program; move it and {self.path.name} away.")
        return known

    def _write_note(self) -> None:
        note = {"url": self.url, "total": self.total, "validator": self.validator}
        write_bytes(self._note, orjson.dumps(note))

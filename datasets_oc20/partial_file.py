"""A download in progress: `NAME.part` beside the file to come, and `NAME.part.json` that says of what.

The second file is written first, so a `.part` without it was not made here, and is left alone.
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import orjson

from datasets_oc20.atomic import publish, write_bytes
from datasets_oc20.errors import DataError
from datasets_oc20.locking import exclusive
from datasets_oc20.progress import byte_bar
from datasets_oc20.untrusted import AnyPath, read_json

_CHUNK = 1 << 20


def md5_sum(path: AnyPath, show_progress: bool = False) -> str:
    """The MD5 sum of a file, hexadecimal."""
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
    """What has arrived of `url`, to be appended to; use it in a `with` block.

    `size` is the number of bytes there, `total` the number there will be, `validator` what the server calls
    this version of the file (ETag or Last-Modified); both are None while unknown.

    Raises:
        DataError: a `.part` that was not made here, or one that another process is writing.
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

    def write(self, chunk: bytes) -> None:
        """Append."""
        self._handle.write(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        """Forget what has arrived."""
        self._handle.truncate(0)
        self.size, self.total, self.validator = 0, None, None
        self._write_note()

    def describe(self, total: int | None, validator: str | None) -> None:
        """Remember which version of the file this is a part of."""
        if (total, validator) != (self.total, self.validator):
            self.total, self.validator = total, validator
            self._write_note()

    def complete(self) -> None:
        """Give the file its name."""
        self._handle.close()
        publish(self.path, self.target)
        self._note.unlink(missing_ok=True)
        self._lock_file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what has arrived."""
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


def is_complete(target: AnyPath, md5: str | None, show_progress: bool) -> bool:
    """Whether `target` is there already, as it should be.

    Raises:
        DataError: it is there with another sum. It is left alone: the user may have put it there.
    """
    target = Path(target)
    if not os.path.lexists(target):
        return False
    if not target.is_file():
        raise DataError(f"{target}: is there already and is not a file; move it away and run again.")
    found = md5_sum(target, show_progress) if md5 else None
    if found != md5:
        raise DataError(
            f"{target}: is there already, but its MD5 sum is {found} instead of {md5}; it was left alone: "
            "move it away and run again."
        )
    return True

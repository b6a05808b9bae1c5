"""Opening LMDB files safely: checked before mapping, once per process, read-only and without locks."""

import os
import struct
import weakref
from pathlib import Path

import lmdb

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath

_MAGIC = 0xBEEFC0DE
# Offsets inside an LMDB meta page, after the page header (lmdb.h 0.9, struct MDB_meta): magic, version,
# address and map size (24 bytes), then two 48-byte MDB_db, the first of which starts with the page size.
_PAGE_SIZE, _LAST_PAGE, _META_BYTES = 24, 24 + 2 * 48, 24 + 2 * 48 + 16
_PAGE_HEADERS = (16, 24)  # LMDB 0.9 and 1.0


def check_lmdb_file(path: AnyPath) -> None:
    """Raise `DataError` unless `path` is a whole LMDB data file.

    LMDB maps the file into memory, and touching a page beyond its end kills the process with SIGBUS
    instead of raising; so the size that the header promises is compared with the size on disk first.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file.")
    if not path.is_file():
        raise DataError(f"{path}: not a file.")
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: the file is empty; download or write it again.")
    with path.open("rb") as handle:
        first = handle.read(_PAGE_HEADERS[-1] + _META_BYTES)
        header = next((skip for skip in _PAGE_HEADERS if _magic(first, skip) == _MAGIC), None)
        if header is None:
            raise DataError(f"{path}: not an LMDB file.")
        page_size = _field("=I", first, header + _PAGE_SIZE)
        if page_size is None or not 256 <= page_size <= 65536:
            raise DataError(f"{path}: the LMDB header is damaged; download or write the file again.")
        handle.seek(page_size)
        second = handle.read(header + _META_BYTES)
    committed = [_committed(page, header) for page in (first, second) if _magic(page, header) == _MAGIC]
    if len(committed) < 2 or None in committed:
        raise DataError(f"{path}: the file is truncated inside its header; download or write it again.")
    _, last_page = max(pair for pair in committed if pair is not None)
    needed = (last_page + 1) * page_size
    if size < needed:
        raise DataError(
            f"{path}: the file is truncated, {size} of {needed} bytes are there; download or write it again."
        )


def _magic(page: bytes, header: int) -> int | None:
    return _field("=I", page, header)


def _committed(page: bytes, header: int) -> tuple[int, int] | None:
    """(transaction, last page) of one of the two meta pages; the higher transaction is the valid one."""
    last_page = _field("=Q", page, header + _LAST_PAGE)
    transaction = _field("=Q", page, header + _LAST_PAGE + 8)
    return None if last_page is None or transaction is None else (transaction, last_page)


def _field(fmt: str, page: bytes, offset: int) -> int | None:
    if len(page) < offset + struct.calcsize(fmt):
        return None
    value: int = struct.unpack_from(fmt, page, offset)[0]
    return value


class LmdbFile:
    """One open LMDB file of this process.

    Do not construct it: `open_lmdb` hands the same object to everyone in the process, because LMDB
    must not open one file twice.
    """

    def __init__(self, path: AnyPath) -> None:
        path = Path(path)
        check_lmdb_file(path)
        self.path = path
        try:
            self.environment = lmdb.open(
                str(path), subdir=False, readonly=True, lock=False, readahead=False, meminit=False
            )
        except lmdb.Error as error:
            raise DataError(f"{path}: LMDB cannot open the file ({error}).") from error
        self._finalizer = weakref.finalize(self, self.environment.close)

    def get(self, key: bytes) -> bytes | None:
        """A copy of the value of `key`, or None."""
        try:
            with self.environment.begin() as transaction:
                value: bytes | None = transaction.get(key)
        except lmdb.Error as error:
            raise DataError(f"{self.path}, key {key.decode()}: the file is damaged ({error}).") from error
        return value

    def entries(self) -> int:
        """Number of keys in the file."""
        return int(self.environment.stat()["entries"])

    def close(self) -> None:
        """Unmap the file."""
        self._finalizer()


_open_files: "weakref.WeakValueDictionary[tuple[int, int], LmdbFile]" = weakref.WeakValueDictionary()


def open_lmdb(path: AnyPath) -> LmdbFile:
    """The open file of this process for `path`, opened when nobody holds it yet."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file.")
    status = path.stat()
    identity = (status.st_dev, status.st_ino)
    found = _open_files.get(identity)
    if found is None:
        found = _open_files[identity] = LmdbFile(path)
    return found


def _forget_inherited_files() -> None:
    """A forked child closes its copies of the parent's maps and opens its own when it reads."""
    for inherited in list(_open_files.values()):
        inherited.close()
    _open_files.clear()


os.register_at_fork(after_in_child=_forget_inherited_files)

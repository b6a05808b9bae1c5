"""Reader of untrusted LMDB files: every page is checked before use, so no file can kill the process.

LMDB itself maps a file into memory and follows the offsets in it, so two changed bytes, or a file that is cut
while it is open, kill the process with SIGSEGV or SIGBUS, which cannot be caught. This reader takes pages
with `pread` and checks their bounds. It reads the formats of LMDB 0.9 and 1.0 (lmdb.h and mdb.c: `MDB_meta`,
`MDB_page`, `MDB_node`): one unnamed database, one value per key, keys in the order of bytes, as in OC20's,
our and ASE's files. Files are written with LMDB (writer.py).
"""

import os
import struct
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath, open_regular, regular_file

_MAGIC = 0xBEEFC0DE
_NO_PAGE = (1 << 64) - 1
# Bytes of a page header: the format's version and the bytes by which offsets in a page are shifted.
_FORMATS = {16: (1, 0), 24: (3, 24)}
# After the page header: magic, version, address and map size (24 bytes), then two 48-byte MDB_db, of the free
# pages and of the records, then the last page and the transaction.
_DB = struct.Struct("=IHHQQQQQ")  # page size or pad, flags, depth, three counts of pages, entries, root
_META = struct.Struct("=II16s48s48sQQ")
_NODE = struct.Struct("=HHHH")  # size low and high (or page), flags, bytes of the key
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE, _DIRTY = 1, 2, 4, 8, 16
_BIG, _SUB, _DUPLICATES = 1, 2, 4
_MAX_DEPTH = 32
_LARGE = 1 << 20
_SMALLEST_ENTRY = 10  # a node, its offset and no key or value


@dataclass(frozen=True)
class _Header:
    """Fields of the newer of the two meta pages."""

    page_header: int
    shift: int
    page_size: int
    last_page: int
    entries: int
    root: int


class LmdbFile:
    """One open LMDB file, read-only and without locks.

    `open_lmdb` returns the same object to all users in the process, so that many datasets of many shards do
    not hold a handle each. Reading is safe from several threads and in forked processes.

    Args:
        path: the file.

    Attributes:
        path: the file.

    Raises:
        DataError: missing, empty, truncated or damaged file, or one of another kind; `path` is named.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path = Path(path)
        with self._naming_errors(path):
            self._file = open_regular(path)
        self._finalizer = weakref.finalize(self, self._file.close)
        status = os.fstat(self._file.fileno())
        self._stamp = status.st_size, status.st_mtime_ns
        if hasattr(os, "posix_fadvise"):  # neighbouring pages will not be needed soon
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        try:
            self._header = self._read_header(status.st_size)
        except BaseException:
            self.close()
            raise

    def get(self, key: bytes) -> bytes | None:
        """Return the value of `key`, or None; raise `DataError` where a page on the way to it is damaged."""
        number = self._header.root
        if number == _NO_PAGE:
            return None
        for _ in range(_MAX_DEPTH):
            page = self._page(number)
            (flags,) = struct.unpack_from("=H", page, self._header.page_header - 6)
            if flags & ~_DIRTY == _LEAF:
                place, is_match = self._search(page, number, key, 0)
                return self._value(page, number, place) if is_match else None
            if flags & ~_DIRTY != _BRANCH:
                self._damaged(number, "is of an unknown kind")
            # The first node of a branch stands for all smaller keys and has none of its own.
            place, is_match = self._search(page, number, key, 1)
            low, high, top, _ = _NODE.unpack_from(
                page, place if is_match else self._node(page, number, place - 1)
            )
            number = low | high << 16 | top << 32
        self._damaged(number, "is deeper in the tree than LMDB allows")

    def entries(self) -> int:
        """Return the number of keys in the file."""
        return self._header.entries

    def close(self) -> None:
        """Close the file."""
        self._finalizer()

    def _page(self, number: int) -> bytes:
        """Read a page of the tree and check that it states its own number."""
        header = self._header
        if not 2 <= number <= header.last_page:
            self._damaged(number, "is not in the file")
        page = os.pread(self._file.fileno(), header.page_size, number * header.page_size)
        if len(page) != header.page_size:
            self._damaged(number, "is not in the file any more")
        if int.from_bytes(page[:8], sys.byteorder) != number:
            self._damaged(number, "says another number")
        return page

    def _pointers(self, page: bytes, number: int) -> "memoryview[int]":
        """The offsets of the nodes of a page."""
        size = self._header.page_header
        lower, upper = struct.unpack_from("=HH", page, size - 4)
        lower, upper = lower + self._header.shift, upper + self._header.shift
        if not size <= lower <= upper <= len(page) or (lower - size) % 2:
            self._damaged(number, "has impossible bounds")
        return memoryview(page)[size:lower].cast("H")

    def _node(self, page: bytes, number: int, index: int) -> int:
        """Offset of node `index`; its header and key are inside the page."""
        pointers = self._pointers(page, number)
        if not 0 <= index < len(pointers):
            self._damaged(number, "has no node")
        start = pointers[index] + self._header.shift
        if start + 8 > len(page) or start + 8 + _NODE.unpack_from(page, start)[3] > len(page):
            self._damaged(number, "has a node outside")
        return start

    def _search(self, page: bytes, number: int, key: bytes, first: int) -> tuple[int, bool]:
        """Offset of the node with `key` and True, or the index of the first larger one and False."""
        pointers, shift, end = self._pointers(page, number), self._header.shift, len(page)
        low, high = first, len(pointers)
        while low < high:
            middle = (low + high) // 2
            start = pointers[middle] + shift
            if start + 8 > end:
                self._damaged(number, "has a node outside")
            stop = start + 8 + int.from_bytes(page[start + 6 : start + 8], sys.byteorder)
            if stop > end:
                self._damaged(number, "has a key outside")
            other = page[start + 8 : stop]
            if other == key:
                return start, True
            if other < key:
                low = middle + 1
            else:
                high = middle
        return low, False

    def _value(self, page: bytes, number: int, start: int) -> bytes:
        """The value of the node of a leaf that begins at `start`."""
        low, high, flags, key_size = _NODE.unpack_from(page, start)
        size = low | high << 16
        # LMDB 1.0 begins values at even places.
        place = start + 8 + key_size + (key_size % 2 if self._header.shift else 0)
        if flags & (_SUB | _DUPLICATES):
            raise DataError(f"{self.path}: holds several databases or values a key, as no OC20 file does.")
        if flags & _BIG:
            if place + 8 > len(page):
                self._damaged(number, "has a value outside")
            return self._overflow(int.from_bytes(page[place : place + 8], sys.byteorder), size)
        if place + size > len(page):
            self._damaged(number, "has a value outside")
        return page[place : place + size]

    def _overflow(self, number: int, size: int) -> bytes:
        """A value of `size` bytes that has pages of its own, from page `number` on."""
        header = self._header
        pages = -(-(header.page_header + size) // header.page_size)
        if not 2 <= number <= header.last_page + 1 - pages:
            self._damaged(number, "is not in the file")
        start = number * header.page_size
        handle = self._file.fileno()
        head = None if size <= _LARGE else os.pread(handle, header.page_header, start)
        if head is None:
            content = os.pread(handle, header.page_header + size, start)
            head = content
        if len(head) < header.page_header:
            self._damaged(number, "is not in the file any more")
        (flags,) = struct.unpack_from("=H", head, header.page_header - 6)
        (count,) = struct.unpack_from("=I", head, header.page_header - 4)
        if int.from_bytes(head[:8], sys.byteorder) != number or flags & ~_DIRTY != _OVERFLOW or count < pages:
            self._damaged(number, "does not begin a value")
        if size > _LARGE:
            content = os.pread(handle, header.page_header + size, start)
        if len(content) != header.page_header + size:
            self._damaged(number, "is not in the file any more")
        return content[header.page_header :]

    def _read_header(self, size: int) -> _Header:
        """The newer meta page, checked against the size of the file."""
        path = self.path
        if size == 0:
            raise DataError(f"{path}: the file is empty; download or write it again.")
        first = os.pread(self._file.fileno(), max(_FORMATS) + _META.size, 0)
        page_header = next((skip for skip in _FORMATS if self._magic(first, skip) == _MAGIC), None)
        if page_header is None:
            raise DataError(f"{path}: not an LMDB file.")
        if len(first) < page_header + _META.size:
            raise DataError(f"{path}: the file is truncated inside its header; download or write it again.")
        page_size = _DB.unpack(_META.unpack_from(first, page_header)[3])[0]
        if not 256 <= page_size <= 65536 or page_size & (page_size - 1):
            raise DataError(f"{path}: the LMDB header is damaged; download or write the file again.")
        second = os.pread(self._file.fileno(), page_header + _META.size, page_size)
        if len(second) < page_header + _META.size or self._magic(second, page_header) != _MAGIC:
            raise DataError(f"{path}: the file is truncated inside its header; download or write it again.")
        metas = [_META.unpack_from(page, page_header) for page in (first, second)]
        known, shift = _FORMATS[page_header]
        if any(meta[1] != known for meta in metas):
            raise DataError(
                f"{path}: is of version {metas[0][1]} of LMDB's format, not {known}; write it again."
            )
        _, _, _, _, records, last_page, _ = max(metas, key=lambda meta: meta[6])
        _, flags, depth, _, _, _, entries, root = _DB.unpack(records)
        if size < (last_page + 1) * page_size:
            raise DataError(
                f"{path}: the file is truncated, {size} of {(last_page + 1) * page_size} bytes are there; "
                "download or write it again."
            )
        if flags:
            raise DataError(f"{path}: its keys are ordered or repeated as in no OC20 file.")
        if depth > _MAX_DEPTH or entries * _SMALLEST_ENTRY > size or (root == _NO_PAGE) != (entries == 0):
            raise DataError(f"{path}: the LMDB header is damaged; download or write the file again.")
        return _Header(page_header, shift, page_size, last_page, entries, root)

    def _damaged(self, page: int, problem: str) -> NoReturn:
        status = os.fstat(self._file.fileno())
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise DataError(f"{self.path}: the file was changed while it was read; run again.")
        raise DataError(
            f"{self.path}: the file is damaged (page {page} {problem}); download or write it again."
        )

    @staticmethod
    def _magic(page: bytes, header: int) -> int | None:
        return struct.unpack_from("=I", page, header)[0] if len(page) >= header + 4 else None

    @staticmethod
    @contextmanager
    def _naming_errors(path: Path) -> Iterator[None]:
        """Turn a missing file into `DataError`, and name the file inside a folder made with `subdir=True`."""
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file.") from error
        except DataError as error:
            inside = path / "data.mdb"
            if inside.is_file():
                raise DataError(f"{path}: is a folder; name {inside}.") from error
            raise


_open_files: "weakref.WeakValueDictionary[tuple[int, ...], LmdbFile]" = weakref.WeakValueDictionary()


def open_lmdb(path: AnyPath) -> LmdbFile:
    """Return the open file of this process for `path`; it is opened if it is not open or has changed.

    Raises:
        DataError: as `LmdbFile`.
    """
    path = Path(path)
    with LmdbFile._naming_errors(path):
        status = regular_file(path).stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    file = _open_files.get(identity)
    if file is None:
        file = _open_files[identity] = LmdbFile(path)
    return file

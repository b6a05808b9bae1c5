"""Unpacking of tar archives from the net: no member leaves the folder, and no existing file is replaced."""

import bz2
import contextlib
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datasets_oc20.atomic import whole_file
from datasets_oc20.disk_space import Need, byte_bar, free_bytes, require_space
from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath, open_regular, regular_file

_CHUNK = 1 << 20
MAX_MEMBERS = 2_000_000
"""Maximum number of files and folders of an archive; tarfile keeps a record of each in memory."""
_MAX_READ = 16 << 20  # bytes that tarfile reads into memory: blocks of files, long names, notes
_MAX_TRAILER = 64 << 20  # bytes; writers fill the last block, of a few MiB at most
_MAX_READS_AT_END = 1000
_DATA = (".extxyz", ".extxyz.xz", ".lmdb", ".aselmdb")

_DAMAGES = (
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    gzip.BadGzipFile,
    ValueError,  # numbers and names in headers
    OverflowError,
    RecursionError,  # long names for long names
)


@dataclass(frozen=True)
class Unpacked:
    """The files of an archive on the disk.

    Attributes:
        folder: the folder they are below.
        files: number of files.
        size: bytes of all files.
        already_there: number of files that were there before.
        data_folders: folders that hold frames (`*.extxyz[.xz]`) or LMDB files, sorted.
    """

    folder: Path
    files: int
    size: int
    already_there: int
    data_folders: list[Path]


def unpack(
    archive: AnyPath,
    folder: AnyPath,
    show_progress: bool = True,
    later: Sequence[Need] = (),
    reserved: Sequence[Path] = (),
    max_members: int = MAX_MEMBERS,
) -> Unpacked:
    """Write the files of a tar archive (plain, gz, bz2 or xz) below `folder`.

    All names are read and checked before anything is written. Writes are atomic, so unpacking can be stopped
    and started again: files of the right size are not written again. Permissions, owners and times in the
    archive are ignored.

    Args:
        archive: the file.
        folder: folder to write below; made when missing.
        show_progress: draw a progress bar on stderr.
        later: space that the caller needs afterwards; checked together with that of the files.
        reserved: files that the caller writes; no member may have their names.
        max_members: maximum number of files and folders in the archive.

    Raises:
        DataError: the archive is damaged; a member would be outside `folder`, is a link or a device, or
            differs from a file that is there; there is no room for what it claims; it has too many members.
        OSError: the disk is full or the folder not writable.
    """
    tar = _TarArchive(archive, Path(folder), max_members)
    members = tar.read_names()
    for name in {tar.path, *reserved} & members.keys():
        raise DataError(f"{tar.path}: member {name.name!r} has a name that is taken; nothing was unpacked.")
    size = sum(members.values())
    existing = {path for path, length in members.items() if tar.is_existing(path, length)}
    missing = size - sum(members[path] for path in existing)
    require_space([Need("unpacked files", tar.folder, missing), *later])
    with byte_bar(f"Unpacking {tar.path.name}", size, show=show_progress) as bar:
        tar.extract(existing, bar)
    data = {path.parent for path in members if path.name.endswith(_DATA)}
    return Unpacked(tar.folder, len(members), size, len(existing), sorted(data))


class _TarArchive:
    """A tar archive of any compression, to be unpacked below `folder`.

    Args:
        path: the archive.
        folder: folder to write below.
        max_members: maximum number of files and folders in the archive.
    """

    def __init__(self, path: AnyPath, folder: Path, max_members: int) -> None:
        try:
            self.path = regular_file(path)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file.") from error
        self.folder = folder
        self._max_members = max_members

    def read_names(self) -> dict[Path, int]:
        """Return the destination of every file with its size in bytes; nothing is written."""
        members: dict[Path, int] = {}
        free, claimed = free_bytes(self.folder), 0
        with self._open() as tar:
            for count, member in enumerate(tar, start=1):
                if count > self._max_members:
                    raise DataError(
                        f"{self.path}: holds more than {self._max_members} members; nothing was unpacked."
                    )
                # Before the next member, which is reached only by unpacking this one.
                path = self._destination(member)
                if path is None or not self.is_existing(path, member.size):
                    claimed += member.size
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name!r} has a size below 0")
                if claimed > free:
                    require_space([Need("unpacked files", self.folder, claimed)])
                if path in members:
                    raise DataError(f"{self.path}: holds {member.name!r} twice; nothing was unpacked.")
                if path is not None:
                    members[path] = member.size
            # To the end, where a compressed stream has its checksum: tar stops before it.
            trailer = 0
            while tar.fileobj is not None and (chunk := tar.fileobj.read(_CHUNK)):
                trailer += len(chunk)
                if trailer > _MAX_TRAILER:
                    raise DataError(
                        f"{self.path}: more than {_MAX_TRAILER >> 20} MiB follow its last file; nothing was "
                        "unpacked."
                    )
        for file in members:
            if not members.keys().isdisjoint(file.parents):
                raise DataError(
                    f"{self.path}: {file.name!r} is in a folder that is also a file; nothing was unpacked."
                )
        if not members:
            raise DataError(f"{self.path}: the archive holds no file.")
        return members

    def is_existing(self, path: Path, size: int) -> bool:
        """Tell whether a file of `size` bytes is there; raise `DataError` if something else is."""
        if not os.path.lexists(path):
            return False
        if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
            raise DataError(
                f"{path}: is in the way of a file of {self.path.name} and differs from it; it was left "
                "alone: move it away and run again."
            )
        return True

    def extract(self, existing: set[Path], bar: Any) -> None:
        """Write all files but the `existing` ones, and advance `bar` by their bytes."""
        with self._open() as tar:
            for member in tar:
                target = self._destination(member)
                if target is not None and target not in existing:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source = tar.extractfile(member)
                    assert source is not None  # only folders and links have no content
                    with source, whole_file(target) as file:
                        shutil.copyfileobj(source, file, _CHUNK)
                bar.update(member.size)

    def _destination(self, member: tarfile.TarInfo) -> Path | None:
        """Return the path of a file, None for a folder; raise `DataError` for a forbidden member."""
        name = PurePosixPath(member.name)
        reason = None
        if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
            reason = "a name outside the folder"
        elif not (member.isreg() or member.isdir()):
            reason = "a link or a device"
        elif not name.parts and not member.isdir():
            reason = "a name outside the folder"
        # A link that is there already must not lead out of the folder either.
        elif not (self.folder / name).parent.resolve().is_relative_to(self.folder.resolve()):
            reason = "a name that a link in the folder leads elsewhere"
        if reason is not None:
            raise DataError(f"{self.path}: member {member.name!r} is {reason}; nothing of it was unpacked.")
        return None if member.isdir() else self.folder / name

    @contextlib.contextmanager
    def _open(self) -> Iterator[tarfile.TarFile]:
        """Open the archive; inside the block, errors of damaged bytes become `DataError`."""
        damaged = f"{self.path}: the archive is truncated or damaged ({{}}); download it again."
        try:
            with open_regular(self.path) as file, contextlib.ExitStack() as stack:
                magic = file.read(6)
                file.seek(0)
                content: Any = file
                if magic.startswith(b"\x1f\x8b"):
                    content = stack.enter_context(gzip.GzipFile(fileobj=file))
                elif magic.startswith(b"BZh"):
                    content = stack.enter_context(bz2.BZ2File(file))
                elif magic.startswith(b"\xfd7zXZ"):
                    content = stack.enter_context(lzma.LZMAFile(file))
                bounded: Any = _BoundedContent(content)
                yield stack.enter_context(tarfile.open(fileobj=bounded, mode="r:"))
        except DataError:
            raise
        except _DAMAGES as error:
            raise DataError(damaged.format(error)) from error
        except OSError as error:
            if error.errno is not None:  # bz2 has no error of its own
                raise
            raise DataError(damaged.format(error)) from error


class _BoundedContent:
    """The decompressed bytes of an archive; a header that claims to be huge, or to have no end, is damage."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._reads_at_end = 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        content: bytes = self._file.read(size)
        self._reads_at_end += bool(size and not content)
        if self._reads_at_end > _MAX_READS_AT_END:
            raise tarfile.ReadError("it ends inside of a header")
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def seekable(self) -> bool:
        return True

"""Unpacking tar archives from the net: no member leaves the folder, nothing that is there is replaced."""

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
from datasets_oc20.disk_space import Need, free_bytes, require_space
from datasets_oc20.errors import DataError
from datasets_oc20.progress import byte_bar
from datasets_oc20.untrusted import AnyPath, open_regular, regular_file

_CHUNK = 1 << 20
MAX_MEMBERS = 2_000_000
"""Most files and folders of an archive; tarfile keeps a record of each in memory."""
_MOST_AT_ONCE = 16 << 20  # of what tarfile reads into memory: blocks of files, long names, notes
_MOST_BEHIND_END = 64 << 20  # writers fill the last block, of a few MiB at most
_MOST_READS_AT_END = 1000
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
    """The files of an archive below `folder`: how many, how many bytes, how many of them were there already.

    `data_folders` are the folders that hold frames (`*.extxyz[.xz]`) or LMDB files, sorted.
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
) -> Unpacked:
    """Write the files of a tar archive (plain, gz, bz2 or xz) below `folder`.

    All names are read and checked before anything is written. Every file appears whole or not at all, so
    unpacking can be stopped and started again: files of the right size are not written again. Permissions,
    owners and times in the archive are ignored. Room for what is missing, and for what will be written
    `later`, is asked for first. No member has the name of a file in `reserved`, which the caller writes.

    Raises:
        DataError: the archive is damaged; a member would be outside `folder`, is a link or a device, or
            differs from a file that is there; there is no room for what it claims; more than `MAX_MEMBERS`.
    """
    archive, folder = _regular(archive), Path(folder)
    members = _read_names(archive, folder)
    for taken in {archive, *reserved} & members.keys():
        raise DataError(f"{archive}: member {taken.name!r} has a name that is taken; nothing was unpacked.")
    size = sum(members.values())
    there = {path for path, length in members.items() if _is_there(path, length, archive)}
    missing = size - sum(members[path] for path in there)
    require_space([Need("unpacked files", folder, missing), *later])
    with (
        _opened(archive) as tar,
        byte_bar(f"Unpacking {archive.name}", size, show=show_progress) as bar,
    ):
        for member in tar:
            target = _destination(member, folder, archive)
            if target is not None and target not in there:
                _extract(tar, member, target)
            bar.update(member.size)
    data = {path.parent for path in members if path.name.endswith(_DATA)}
    return Unpacked(folder, len(members), size, len(there), sorted(data))


def _read_names(archive: Path, folder: Path) -> dict[Path, int]:
    """Where every file of the archive goes, with its size."""
    members: dict[Path, int] = {}
    free, claimed = free_bytes(folder), 0
    with _opened(archive) as tar:
        for count, member in enumerate(tar, start=1):
            if count > MAX_MEMBERS:
                raise DataError(f"{archive}: holds more than {MAX_MEMBERS} members; nothing was unpacked.")
            # Now, since the next member is reached only by unpacking this one: some 1000 times the archive.
            path = _destination(member, folder, archive)
            if path is None or not _is_there(path, member.size, archive):
                claimed += member.size
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name!r} has a size below 0")
            if claimed > free:
                require_space([Need("unpacked files", folder, claimed)])
            if path in members:
                raise DataError(f"{archive}: holds {member.name!r} twice; nothing was unpacked.")
            if path is not None:
                members[path] = member.size
        # To the end, where a compressed stream has its sum: tar stops before it.
        behind = 0
        while tar.fileobj is not None and (more := tar.fileobj.read(_CHUNK)):
            behind += len(more)
            if behind > _MOST_BEHIND_END:
                raise DataError(f"{archive}: goes on and on behind its last file; nothing was unpacked.")
    for file in members:
        if not members.keys().isdisjoint(file.parents):
            raise DataError(
                f"{archive}: {file.name!r} is in a folder that is also a file; nothing was unpacked."
            )
    if not members:
        raise DataError(f"{archive}: the archive holds no file.")
    return members


def _destination(member: tarfile.TarInfo, folder: Path, archive: Path) -> Path | None:
    """Where a member goes, None for a folder; raises `DataError` for one that must not be unpacked."""
    name = PurePosixPath(member.name)
    reason = None
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        reason = "a name outside the folder"
    elif not (member.isreg() or member.isdir()):
        reason = "a link or a device"
    elif not name.parts and not member.isdir():
        reason = "a name outside the folder"
    # A link that is there already must not lead out of the folder either.
    elif not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
        reason = "a name that a link in the folder leads elsewhere"
    if reason is not None:
        raise DataError(f"{archive}: member {member.name!r} is {reason}; nothing of it was unpacked.")
    return None if member.isdir() else folder / name


def _is_there(path: Path, size: int, archive: Path) -> bool:
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
        raise DataError(
            f"{path}: is in the way of a file of {archive.name} and differs from it; it was left alone: "
            "move it away and run again."
        )
    return True


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None  # only folders and links have no content
    with source, whole_file(path) as target:
        shutil.copyfileobj(source, target, _CHUNK)


def _regular(archive: AnyPath) -> Path:
    try:
        return regular_file(archive)
    except FileNotFoundError as error:
        raise DataError(f"{archive}: no such file.") from error


class _Content:
    """The unpacked bytes of an archive; a header that claims to be huge, or to have no end, is damage."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._at_end = 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_AT_ONCE:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        content: bytes = self._file.read(size)
        self._at_end += bool(size and not content)
        if self._at_end > _MOST_READS_AT_END:
            raise tarfile.ReadError("it ends inside of a header")
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def seekable(self) -> bool:
        return True


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """The archive, whose damage is named."""
    with _damage_is_named(archive), open_regular(archive) as file, contextlib.ExitStack() as stack:
        magic = file.read(6)
        file.seek(0)
        content: Any = file
        if magic.startswith(b"\x1f\x8b"):
            content = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif magic.startswith(b"BZh"):
            content = stack.enter_context(bz2.BZ2File(file))
        elif magic.startswith(b"\xfd7zXZ"):
            content = stack.enter_context(lzma.LZMAFile(file))
        bounded: Any = _Content(content)
        yield stack.enter_context(tarfile.open(fileobj=bounded, mode="r:"))


@contextlib.contextmanager
def _damage_is_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _DAMAGES as error:
        raise DataError(
            f"{archive}: the archive is truncated or damaged ({error}); download it again."
        ) from error
    except OSError as error:
        if error.errno is not None:  # bz2 has no error of its own
            raise
        raise DataError(
            f"{archive}: the archive is truncated or damaged ({error}); download it again."
        ) from error

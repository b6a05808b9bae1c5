"""Unpacking tar archives from the net: no member leaves the folder, nothing that is there is replaced."""

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

from datasets_oc20.atomic import whole_file
from datasets_oc20.disk_space import Need, require_space
from datasets_oc20.errors import DataError
from datasets_oc20.progress import byte_bar
from datasets_oc20.untrusted import AnyPath, regular_file

_CHUNK = 1 << 20
_DATA = (".extxyz", ".extxyz.xz", ".lmdb", ".aselmdb")


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
            differs from a file that is there; there is no room.
    """
    archive, folder = _regular(archive), Path(folder)
    members = _read_names(archive, folder)
    for path in {archive, *reserved} & members.keys():
        raise DataError(f"{archive}: member {path.name!r} has a name that is taken; nothing was unpacked.")
    size = sum(members.values())
    there = {path for path, length in members.items() if _is_there(path, length, archive)}
    missing = size - sum(members[path] for path in there)
    require_space([Need("unpacked files", folder, missing), *later])
    with (
        _damage_is_named(archive),
        tarfile.open(archive, "r:*") as tar,
        byte_bar(f"Unpacking {archive.name}", size, show=show_progress) as bar,
    ):
        for member in tar:
            path = _destination(member, folder, archive)
            if path is not None and path not in there:
                _extract(tar, member, path)
            bar.update(member.size)
    data = {path.parent for path in members if path.name.endswith(_DATA)}
    return Unpacked(folder, len(members), size, len(there), sorted(data))


def _read_names(archive: Path, folder: Path) -> dict[Path, int]:
    """Where every file of the archive goes, with its size."""
    members: dict[Path, int] = {}
    with _damage_is_named(archive), tarfile.open(archive, "r:*") as tar:
        for member in tar:
            path = _destination(member, folder, archive)
            if path in members:
                raise DataError(f"{archive}: holds {member.name!r} twice; nothing was unpacked.")
            if path is not None:
                members[path] = member.size
        # To the end, where a compressed stream has its sum: tar stops before it.
        while tar.fileobj is not None and tar.fileobj.read(_CHUNK):
            pass
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


@contextlib.contextmanager
def _damage_is_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if error.filename != str(archive):
            raise
        raise DataError(f"{archive}: no such file.") from error
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(
            f"{archive}: the archive is truncated or damaged ({error}); download it again."
        ) from error

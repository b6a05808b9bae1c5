"""Is there room? Asked before hours of work, with every part of the answer in the message."""

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets_oc20.errors import DataError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Need:
    """`size` bytes for `what` in `folder`, which need not exist yet."""

    what: str
    folder: Path
    size: int


def require_space(needs: Sequence[Need]) -> None:
    """Raise `DataError` unless every disk has room for all that will be written to it.

    Folders on the same disk are added up. Quotas are not known to the system call and so not seen.
    """
    disks: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        disks[os.stat(_existing(need.folder)).st_dev].append(need)
    for parts in disks.values():
        wanted = sum(part.size for part in parts)
        free = free_bytes(parts[0].folder)
        if wanted > free:
            listed = ", ".join(f"{part.what} {human(part.size)}" for part in parts if part.size)
            raise DataError(
                f"{parts[0].folder}: {human(wanted)} are needed ({listed}) but {human(free)} are free; "
                "free some space or name a folder on a larger disk."
            )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def human(size: float) -> str:
    """Bytes as text, e.g. "3.4 GiB"."""
    for unit in _UNITS[:-1]:
        if abs(size) < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


def _existing(folder: Path) -> Path:
    """`folder` or the first of its parents that exists."""
    resolved = folder.resolve()
    return next(place for place in (resolved, *resolved.parents) if place.exists())

"""Disk space and byte counts: check of the free space before long work, sizes as text, progress bars."""

import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from datasets_oc20.errors import DataError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Need:
    """Space that a part of the work will take.

    Attributes:
        purpose: the files, for the error message.
        folder: folder of the files, which need not exist yet.
        size: bytes.
    """

    purpose: str
    folder: Path
    size: int


def require_space(needs: Sequence[Need]) -> None:
    """Check that every disk has room for all that will be written to it.

    Folders on the same disk are added up. Quotas are unknown to the system call and so not considered.

    Raises:
        DataError: a disk has too little free space; the parts of the need are listed.
    """
    disks: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        disks[os.stat(_existing_parent(need.folder)).st_dev].append(need)
    for parts in disks.values():
        size = sum(part.size for part in parts)
        free = free_bytes(parts[0].folder)
        if size > free:
            listed = ", ".join(f"{part.purpose} {human(part.size)}" for part in parts if part.size)
            raise DataError(
                f"{parts[0].folder}: {human(size)} are needed ({listed}) but {human(free)} are free; "
                "free some space or name a folder on a larger disk."
            )


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing_parent(folder)).free


def _existing_parent(folder: Path) -> Path:
    """Return `folder` or the first of its parents that exists."""
    resolved = folder.resolve()
    return next(place for place in (resolved, *resolved.parents) if place.exists())


def human(size: float) -> str:
    """Format a number of bytes as text, e.g. "3.4 GiB"."""
    for unit in _UNITS[:-1]:
        if abs(size) < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


def byte_bar(label: str, total: int | None, done: int = 0, show: bool = True) -> "tqdm[None]":
    """Make a progress bar on stderr with bytes, rate and time left.

    It is redrawn every second on a terminal, every minute in a log file.

    Args:
        label: text before the bar.
        total: bytes of the whole transfer; None if unknown.
        done: bytes transferred before.
        show: False draws nothing.
    """
    return tqdm(
        desc=label,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=1.0 if sys.stderr.isatty() else 60.0,
        disable=not show,
    )

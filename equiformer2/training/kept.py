"""The checkpoints before the last one, kept under their steps."""

import os
import re
import shutil
from pathlib import Path

from equiformer2.files import whole_file

_NAME = re.compile(r"step_(\d+)\.ckpt")


def keep_under_step(last: Path, step: int, count: int) -> None:
    """Give the checkpoint `last`, which is about to be replaced, the name `step_N.ckpt` as well.

    Nothing happens where there is no such checkpoint, it has that name already, or `count` is 0.

    Raises:
        OSError: the disk is full, on file systems without hard links; elsewhere it costs no space.
    """
    kept = last.with_name(f"step_{step}.ckpt")
    if count < 1 or not last.exists() or kept.exists():
        return
    try:
        os.link(last, kept)
    except OSError:
        with last.open("rb") as source, whole_file(kept) as copy:
            shutil.copyfileobj(source, copy)


def remove_older(last: Path, count: int) -> None:
    """Remove all `step_N.ckpt` beside `last` but the `count` that were written last."""
    found = [(path.stat().st_mtime_ns, int(match[1]), path) for path, match in _numbered(last.parent)]
    for _, _, path in sorted(found)[: max(0, len(found) - count)]:
        path.unlink()


def latest(folder: Path) -> Path | None:
    """The `step_N.ckpt` that was written last."""
    found = [(path.stat().st_mtime_ns, int(match[1]), path) for path, match in _numbered(folder)]
    return max(found)[2] if found else None


def _numbered(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return [(path, match) for path, match in matches if match is not None]

"""Where compiled libraries are kept: a folder that only this user can write to; what lies there is run."""

import atexit
import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

#: A library of another source, compiler or processor goes when nothing has loaded it for so long.
DAYS_KEPT = 90
# What a compiler that was killed has left behind.
_DAYS_UNFINISHED = 1


def cache_folder() -> Path:
    """`equiformer2` in the user's cache, else one of the user in the temporary folder, else a new one."""
    for folder in _candidates():
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_private(folder):
                return folder
    folder = Path(tempfile.mkdtemp(prefix="equiformer2-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def remove_unused(folder: Path) -> None:
    """Delete libraries that nothing has loaded for `DAYS_KEPT`; a process that has one open keeps it."""
    now = time.time()
    for pattern, days in (("kernels-*.so", DAYS_KEPT), ("*.so.part", _DAYS_UNFINISHED)):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > days * 86400:
                    path.unlink()


def mark_used(path: Path) -> None:
    """Keep `path` from `remove_unused`."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _candidates() -> list[Path]:
    folders = []
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):
        folders.append(Path(cache) / "equiformer2")
    else:
        with contextlib.suppress(RuntimeError):  # neither HOME nor an entry among the users
            folders.append(Path.home() / ".cache" / "equiformer2")
    if hasattr(os, "getuid"):
        shared = Path(tempfile.gettempdir()) / f"equiformer2-{os.getuid()}"
        # Where everybody can write, a link may lead anywhere.
        folders += [] if shared.is_symlink() else [shared]
    return folders


def _is_private(folder: Path) -> bool:
    status = folder.stat()
    own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return own and not status.st_mode & 0o022 and os.access(folder, os.W_OK | os.X_OK)

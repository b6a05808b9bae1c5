"""One process at a time."""

import contextlib
import errno
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from datasets_oc20.errors import DataError

#: Seconds for which `exclusive` waits; the workers of a killed run notice its end within half a second.
PATIENCE = 1.0


def exclusive(lock_file: Path, subject: Path) -> AbstractContextManager[object]:
    """Lock a file, at once, until the returned context ends or the process ends, however it ends.

    On file systems without locks (some parallel ones) nothing is locked.

    Args:
        lock_file: file that is locked; it is made and holds nothing.
        subject: path that an error names.

    Raises:
        DataError: another process holds the lock.
    """
    try:
        return FileLock(lock_file, fallback_to_soft=False).acquire(timeout=PATIENCE)
    except Timeout as error:
        raise DataError(f"{subject}: another process is writing here; wait for it or stop it.") from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        return contextlib.nullcontext()

"""One process at a time."""

import errno
import fcntl
from pathlib import Path
from typing import IO

from datasets_oc20.errors import DataError

_NOT_SUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def lock(handle: IO[bytes], path: Path) -> None:
    """Lock an open file until it is closed or the process ends, however it ends.

    On file systems without locks (some parallel ones) nothing is locked.

    Raises:
        DataError: another process holds the lock; `path` is named.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"{path}: another process is writing here; wait for it or stop it.") from error
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise

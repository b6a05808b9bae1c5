"""One process at a time."""

import errno
import fcntl
import time
from pathlib import Path
from typing import IO

from datasets_oc20.errors import DataError

# The workers of a killed run, which share its lock, notice within half a second.
PATIENCE = 3.0
_NOT_SUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def lock(handle: IO[bytes], path: Path) -> None:
    """Lock an open file until it is closed or the process ends, however it ends.

    On file systems without locks (some parallel ones) nothing is locked.

    Raises:
        DataError: another process holds the lock; `path` is named.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise DataError(
                    f"{path}: another process is writing here; wait for it or stop it."
                ) from error
            time.sleep(0.1)
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                return
            raise

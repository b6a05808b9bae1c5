"""What every entry point shares: a user's mistake becomes one line and a non-zero exit status."""

import sys
from collections.abc import Callable

from datasets_oc20.errors import DataError
from equiformer2.errors import InputError


def run_script(main: Callable[[], int | None]) -> None:
    """Run `main` and leave the process with its status.

    `InputError`, `DataError` and `OSError` (missing file, full disk, no permission) are printed as
    one `error: …` line and give status 2; any other exception is a bug and keeps its traceback.
    """
    try:
        status = main()
    except (InputError, DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(status or 0)

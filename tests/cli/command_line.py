"""Commands and scripts run in the test's own process."""

import contextlib
import logging
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

from equiformer2.cli.main import main

ROOT = Path(__file__).parents[2]


def run_command(command: str, *arguments: object) -> int:
    """Exit status of `equiformer2 COMMAND ARGUMENTS`."""
    with _own_log():
        return main([*command.split(), *map(str, arguments)])


def run_script_file(name: str, *arguments: object) -> int:
    """Exit status of `python NAME ARGUMENTS`; a name without a folder is one of `scripts`."""
    path = ROOT / (name if "/" in name else f"scripts/{name}.py")
    before, sys.argv = sys.argv, [str(path), *map(str, arguments)]
    try:
        with _own_log():
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    raise AssertionError(f"{name} did not leave the process")


@contextlib.contextmanager
def _own_log() -> Iterator[None]:
    """Leave the loggers as they are: commands set them up for their process."""
    logger, root = logging.getLogger("equiformer2"), logging.getLogger()
    level, handlers = logger.level, root.handlers[:]
    try:
        yield
    finally:
        logger.setLevel(level)
        root.handlers[:] = handlers

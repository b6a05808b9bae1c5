"""The progress bar of long transfers: bytes, rate and time left."""

import sys

from tqdm import tqdm


def byte_bar(what: str, total: int | None, done: int = 0, show: bool = True) -> "tqdm[None]":
    """A bar on stderr; a new state every second on a terminal, every minute in a log file."""
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=1.0 if sys.stderr.isatty() else 60.0,
        disable=not show,
    )

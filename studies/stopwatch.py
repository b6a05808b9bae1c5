"""Time that a study takes, over all the calls in which it was computed."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from equiformer2.files import write_json

_NAME = "seconds.json"


class Stopwatch:
    """Adds up the seconds of the parts of a study in its folder.

    A folder with results of which nobody knows how long they took is not timed.

    Args:
        folder: of all results of the study.
        clock: seconds from any start.
        interval: seconds between two notes: what a killed call leaves out at most.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.monotonic, interval: float = 10.0
    ) -> None:
        self._clock, self._interval = clock, interval
        self._path = folder / _NAME
        self._seconds = read_seconds(folder)
        self._timed = bool(self._seconds) or not folder.exists()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context whose time belongs to the part `name`."""
        if not self._timed:
            yield
            return
        before, start, done = self._seconds.get(name, 0.0), self._clock(), threading.Event()

        def note() -> None:
            self._seconds[name] = before + self._clock() - start
            write_json(self._path, self._seconds, make_folder=True)

        def note_now_and_then() -> None:
            while not done.wait(self._interval):
                note()

        note()
        thread = threading.Thread(target=note_now_and_then, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            note()


def read_seconds(folder: Path) -> dict[str, float]:
    """Seconds of every part, in the order of their first calls; empty where nothing is known."""
    try:
        content = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        return {str(name): float(seconds) for name, seconds in content.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def in_words(seconds: dict[str, float]) -> str:
    """The sum in hours and every part in minutes, as one sentence; empty where nothing was timed."""
    if not seconds:
        return ""
    parts = ", ".join(f"{name} {value / 60:.0f} min" for name, value in seconds.items())
    return f"Computed in {sum(seconds.values()) / 3600:.2f} h ({parts})."

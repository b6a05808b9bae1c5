"""Commands of the package in processes of their own, so that small networks train on every core."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError

_SECONDS_TO_STOP = 30.0


class BackgroundCommand:
    """`equiformer2 …` in another process; a context, at whose end it does not run any more.

    A small network is computed about as fast with one thread as with two, so commands side by side share the
    cores.

    Args:
        words: words behind `equiformer2`.
        log: file for all that the command prints.
        beside: number of commands that run at the same time, which share the threads of this process.
    """

    def __init__(self, words: Sequence[str | Path], log: AnyPath, beside: int) -> None:
        self._words, self._log = [str(word) for word in words], Path(log)
        threads = max(1, torch.get_num_threads() // beside)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "equiformer2", *self._words],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )

    def __enter__(self) -> "BackgroundCommand":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the command if it still runs: it saves what it has and ends."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def runs(self) -> bool:
        """True until the command has ended."""
        return self._process.poll() is None

    def check(self) -> None:
        """Wait for the end of the command.

        Raises:
            InputError: it failed; the last line that it printed is quoted, and its log named.
        """
        if self._process.wait() != 0:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
            raise InputError(
                f"equiformer2 {self._words[0]} ended with status {self._process.returncode}: {last} "
                f"(its output is in {self._log})"
            )


def wait_for(commands: Sequence[BackgroundCommand], label: str, seconds: float) -> None:
    """Wait for commands behind a progress bar.

    Args:
        commands: those that run.
        label: of the bar.
        seconds: time that they are expected to take.

    Raises:
        InputError: one of them failed.
    """
    start = time.monotonic()
    with tqdm(total=round(seconds), desc=label, unit="s", disable=None) as bar:
        while any(command.runs for command in commands):
            time.sleep(0.2)
            bar.update(min(bar.total, int(time.monotonic() - start)) - bar.n)
    for command in commands:
        command.check()

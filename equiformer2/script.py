"""Entry points: exit statuses, one-line errors, the log on standard error, the origin of results files."""

import hashlib
import io
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from datasets_oc20.errors import DataError
from equiformer2.errors import InputError
from equiformer2.version import __version__

_OWN_FOLDERS = ("scripts", "benchmarks", "studies")
_began = time.monotonic()  # start of the command that runs


def run_script(main: Callable[[], int | None]) -> None:
    """Run `main` and leave the process with `exit_status`; `--debug` is taken from the command line."""
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(exit_status(main, debug))


def exit_status(main: Callable[[], int | None], debug: bool = False) -> int:
    """Run `main` and return the exit status of its process; characters that the terminal lacks are escaped.

    Status 2 and one `error: …` line for bad input: `InputError`, `DataError`, `OSError`
    (missing file, full disk, no permission) and too little memory. Status 1 and one line for any other
    exception, which is a bug. Status 130 after Ctrl-C, 128 + n after SIGTERM and SIGHUP, on which the
    process leaves its blocks and so removes its unfinished files; `main` may handle these itself.

    Args:
        main: the work; returns its status, None for 0, or raises `SystemExit`.
        debug: print tracebacks, those of bad input too.
    """
    global _began
    _began = time.monotonic()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal in ASCII prints Å as \\xc5; a log file shows every line when it is printed.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    # Signals that would kill the process at once end it as an exception does.
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        if os.getpid() != owner:  # a forked worker has nothing to remove
            os.kill(os.getpid(), number)
        sys.exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, end)
    try:
        status = main()
        sys.stdout.flush()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, InputError | DataError | OSError):
            print(f"error: {_one_line(error)}", file=sys.stderr)
            return 2
        if isinstance(error, MemoryError):
            print("error: there is too little memory: use smaller batches or structures", file=sys.stderr)
            return 2
        name = type(error).__name__
        print(f"error: this is a bug ({name}: {_one_line(error)[:300]})", end="", file=sys.stderr)
        print("; report it with the command and its traceback", end="", file=sys.stderr)
        print("" if debug else ", which --debug shows", file=sys.stderr)
        return 1
    return status or 0


def origin() -> dict[str, str]:
    """Command that makes a results file, as it was typed, and commit of the code.

    Outside a checkout the commit is the version of the package.
    """
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.name != "__main__.py":
        name = (
            script.name if script.parent.name not in _OWN_FOLDERS else f"{script.parent.name}/{script.name}"
        )
        if script.parent.name in ("benchmarks", "studies"):
            name = f"-m {script.parent.name}.{script.stem}"
        words = ["python", *name.split(" ", 1), *sys.argv[1:]]
    else:
        words = ["equiformer2", *sys.argv[1:]]
    return {"command": shlex.join(words), "commit": commit()}


def header(
    schema: str, checkpoint: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
) -> dict[str, Any]:
    """First keys of every JSON document: `schema`, `command`, `commit`, `checkpoint_sha256`, `seconds`.

    Args:
        schema: name and version of the document's keys, such as `"relaxation/1"`.
        checkpoint: file of the network behind the results; without one its sum is None. For the files of a
            committee there is a list of sums.
    """

    def digest_of(path: str | os.PathLike[str]) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    digest: str | list[str] | None = None
    if isinstance(checkpoint, str | os.PathLike):
        digest = digest_of(checkpoint)
    elif checkpoint is not None:
        digest = [digest_of(path) for path in checkpoint]
    seconds = round(time.monotonic() - _began, 3)
    return {"schema": schema, **origin(), "checkpoint_sha256": digest, "seconds": seconds}


def commit() -> str:
    """The commit of the package, with `+` when its files differ from it; outside git its version."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments],
                cwd=Path(__file__).parent,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    # Installed into an environment inside somebody else's checkout, the commit would be of that one.
    name = git("rev-parse", "--short=10", "HEAD") if git("ls-files", "--", "script.py") else ""
    if not name:
        return f"version {__version__}"
    return name + "+" if git("status", "--porcelain", "--", ".", "../datasets_oc20") else name


def show_log() -> None:
    """Print what the package logs, such as which weights of a checkpoint are used."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("equiformer2").setLevel(logging.INFO)


def _one_line(error: Exception) -> str:
    """The sentence of an error; from a loader process it comes inside a traceback, of which it is the end."""
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"  # without the number that Python adds
    text = str(error)
    if text.startswith("Caught "):
        text = text.rpartition(f".{type(error).__name__}: ")[2]
    return " ".join(text.split())

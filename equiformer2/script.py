"""What entry points share: one line for a user's mistake, the log on stderr, the choice of a model."""

import argparse
import copy
import io
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from datasets_oc20.errors import DataError
from equiformer2.errors import InputError


def run_script(main: Callable[[], int | None]) -> None:
    """Run `main` and leave the process with its status; nothing that is printed can fail for its letters.

    Status 2 and one `error: …` line for what is wrong with the input: `InputError`, `DataError`, `OSError`
    (missing file, full disk, no permission) and too little memory. Status 1 and one line for any other
    exception, which is a bug; with `--debug` on the command line its traceback is shown, and that of errors
    in the input, too. Status 130 after Ctrl-C, 128 + n after SIGTERM and SIGHUP, on which the
    process leaves its blocks and so removes its unfinished files; `main` may handle these itself.
    """
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal in ASCII prints Å as \\xc5
            stream.reconfigure(errors="backslashreplace")
    _end_blocks_on_signals()
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `… | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, InputError | DataError | OSError):
            print(f"error: {_one_line(error)}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, MemoryError):
            print("error: there is too little memory: use smaller batches or structures", file=sys.stderr)
            sys.exit(2)
        name = type(error).__name__
        print(f"error: this is a bug ({name}: {_one_line(error)[:300]})", end="", file=sys.stderr)
        print("; report it with the command and its traceback", end="", file=sys.stderr)
        print("" if debug else ", which --debug shows", file=sys.stderr)
        sys.exit(1)
    sys.exit(status or 0)


def _end_blocks_on_signals() -> None:
    """Let signals that would kill the process at once end it like an exception does."""
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


def origin() -> dict[str, str]:
    """Command that makes a results file, as it was typed, and commit of the code.

    Outside a checkout the commit is the version of the package.
    """
    script = Path(sys.argv[0])
    program = [script.name if script.parent.name != "scripts" else f"scripts/{script.name}"]
    if script.parent.name in ("benchmarks", "studies"):
        program = ["-m", f"{script.parent.name}.{script.stem}"]
    return {"command": shlex.join(["python", *program, *sys.argv[1:]]), "commit": commit()}


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
        return f"version {version('equiformer2')}"
    return name + "+" if git("status", "--porcelain", "--", ".", "../datasets_oc20") else name


def show_log() -> None:
    """Print what the package logs, such as which weights of a checkpoint are used."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("equiformer2").setLevel(logging.INFO)


def add_model_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--checkpoint`, `--weights`, `--energy-kind`, `--device`, `--precision` and `--backend`."""
    parser.add_argument("--checkpoint", required=True, help="native, OCP or fairchem v1 checkpoint file")
    parser.add_argument(
        "--weights", choices=("raw", "averaged"), help="default: averaged where the file has them"
    )
    parser.add_argument(
        "--energy-kind",
        "--energy_kind",
        choices=("adsorption", "total"),
        help="for a checkpoint, or data, that does not say it; must not contradict them",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: cpu)")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "tf32", "bf16"),
        help="of the matrix products (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "torch", "cpp", "compile", "triton"),
        help="what runs the hot operations (default: %(default)s)",
    )


def add_overwrite_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--overwrite`."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier call wrote to --out"
    )


def add_router_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--router`."""
    parser.add_argument(
        "--router",
        metavar="FILE",
        help="skip atoms or edges: a router of `prune.py route` or of training (backends auto, torch, cpp)",
    )


def parse_checked(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    needs: Iterable[tuple[str, str]] = (),
    excludes: Iterable[tuple[str, str]] = (),
) -> argparse.Namespace:
    """The parsed options; one that would be ignored is refused as argparse refuses (status 2).

    Args:
        parser: its own defaults say nothing of what was given.
        argv: arguments; those of the process unless given.
        needs: pairs: an option, and the one without which it means nothing.
        excludes: pairs: an option, and one, or `--option=choice`, beside which it means nothing.
    """
    arguments = parser.parse_args(argv)
    given = _given(parser, argv)

    def is_given(option: str) -> bool:
        name, _, choice = option.partition("=")
        dest = name.removeprefix("--").replace("-", "_")
        return str(getattr(arguments, dest)) == choice if choice else dest in given

    for option, other in needs:
        if is_given(option) and not is_given(other):
            parser.error(f"{option} has no meaning without {other}: give both, or leave it out")
    for option, other in excludes:
        if is_given(option) and is_given(other):
            parser.error(f"{option} has no meaning with {other.replace('=', ' ')}: leave one of them out")
    return arguments


def _given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Names of the options on the command line, whatever their values."""
    sparse = copy.deepcopy(parser)
    for action in sparse._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return set(vars(sparse.parse_args(argv)))


def _one_line(error: Exception) -> str:
    """The sentence of an error; from a loader process it comes inside a traceback, of which it is the end."""
    text = str(error)
    if text.startswith("Caught "):
        text = text.rpartition(f".{type(error).__name__}: ")[2]
    return " ".join(text.split())

"""What entry points share: one line for a user's mistake, the log on stderr, the choice of a model."""

import argparse
import copy
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

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
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(status or 0)


def origin() -> dict[str, str]:
    """Command that makes a results file, as it was typed, and commit of the code.

    Outside a checkout the commit is the version of the package.
    """
    script = Path(sys.argv[0])
    name = script.name if script.parent.name != "scripts" else f"scripts/{script.name}"
    return {"command": shlex.join(["python", name, *sys.argv[1:]]), "commit": commit()}


def commit() -> str:
    """The commit of the package, with `+` when its files differ from it; outside git its version."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
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

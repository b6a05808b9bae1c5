"""The base class of commands, their parser and their result."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equiformer2.deprecation import warn_once


@dataclass(frozen=True)
class Result:
    """Outcome of a command.

    Attributes:
        record: content of the JSON document that `--json` prints, without the keys of `script.header`.
        status: exit status of the process: 0, or 3 for a result that has not converged or misses a limit.
        checkpoint: path of the checkpoint behind the result, or the paths of a committee; the SHA-256 is
            printed with `--json`.
        whole: the record is all that `--json` prints, without these keys.
    """

    record: Mapping[str, Any] = field(default_factory=dict)
    status: int = 0
    checkpoint: str | Sequence[str] | None = None
    whole: bool = False


class Parser(argparse.ArgumentParser):
    """An argument parser of options with dashes, which accepts the older spelling with underscores.

    Options cannot be abbreviated, so that a new option never changes the meaning of an old command line.
    """

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse after replacing underscores of option names, except behind a `--`."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        for position, argument in enumerate(given[:end]):
            name, equals, value = argument.partition("=")
            dashed = name.replace("_", "-")
            if name.startswith("--") and name != dashed and dashed in self._option_string_actions:
                warn_once(f"{name} is now spelt {dashed}")
                given[position] = f"{dashed}{equals}{value}"
        return super().parse_known_args(given, namespace)


class Command:
    """A subcommand of `equiformer2`; its docstring is its help text (see `equiformer2.cli`)."""

    def add_arguments(self, parser: Parser) -> None:
        """Add the options of this command."""
        raise NotImplementedError

    def run(self, options: argparse.Namespace) -> Result:
        """Do the work and print what a person reads.

        Raises:
            InputError: bad input; so do `DataError` and `OSError` end with status 2.
        """
        raise NotImplementedError

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        """Read the command line; commands override it to check how options go together."""
        return parser.parse_args(arguments)

"""Dispatch of the console command `equiformer2`, and the entries in `scripts/`."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import checkpoint_file
from equiformer2.script import exit_status, header
from equiformer2.version import __version__

COMMANDS = {
    "train": "training:Train",
    "finetune": "finetune:FineTune",
    "evaluate": "inference:Evaluate",
    "predict": "inference:Predict",
    "relax": "inference:Relax",
    "adsorption energy": "adsorption:AdsorptionEnergy",
    "adsorption search": "adsorption_search:AdsorptionSearch",
    "adsorption verify": "adsorption_search:AdsorptionVerify",
    "adsorption ask": "adsorption_dft:AdsorptionAsk",
    "adsorption collect": "adsorption_dft:AdsorptionCollect",
    "adsorption corrections": "adsorption_dft:AdsorptionCorrections",
    "adsorption free-energy": "adsorption_thermo:AdsorptionFreeEnergy",
    "adsorption diagram": "adsorption_thermo:AdsorptionDiagram",
    "adsorption volcano": "adsorption_thermo:AdsorptionVolcano",
    "adsorption neb": "adsorption_dft:AdsorptionNeb",
    "adsorption benchmark": "adsorption_benchmark:AdsorptionBenchmark",
    "adsorption coverage": "coverage:AdsorptionCoverage",
    "adsorption slab": "slab:BuildSlab",
    "relax-is2re": "inference:RelaxIs2re",
    "submission": "inference:Submission",
    "data download": "data:Download",
    "data preprocess": "data:Preprocess",
    "data import": "data_import:Import",
    "data inspect": "data:Inspect",
    "data convert": "data:Convert",
    "data references": "data:References",
    "checkpoint import": "training:ImportCheckpoint",
    "adapters merge": "adapters:Merge",
    "adapters inspect": "adapters:Inspect",
    "experts merge": "experts:Merge",
    "experts prune": "expert_pruning:Prune",
    "experts retrieve": "expert_pruning:Retrieve",
    "prune report": "prune:Report",
    "prune plan": "prune:Plan",
    "prune apply": "prune:Apply",
    "prune route": "prune:Route",
    "prune distill": "prune:Distill",
    "prune grid": "prune:Grid",
    "prune quantize": "prune:Quantize",
    "prune pareto": "prune:Pareto",
    "report": "training:ReportRun",
    "demo": "training:Demo",
    "doctor": "doctor:Doctor",
    "completion": "main:Completion",
}
"""Words of a command -> file in this folder and class."""

GROUPS = {
    "adsorption": "Slabs, and adsorption energies of molecules on them.",
    "data": "Download, convert and inspect data.",
    "checkpoint": "Work with checkpoint files.",
    "adapters": "Work with adapters of a fine-tuned network.",
    "experts": "Take tasks or single experts out of a network of experts.",
    "prune": "Analyze and compress a trained model.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        arguments: words behind `equiformer2`; those of the process unless given.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:
        words = [word for word in words if word != "--debug"]
    return exit_status(lambda: _run(words), debug)


def script(command: str) -> NoReturn:
    """Run a command as the script of the same purpose in `scripts/` and leave the process."""
    sys.exit(main([*command.split(), *sys.argv[1:]]))


def build_parser() -> Parser:
    """Parser of all commands, for help texts and shell completion; imports no torch."""
    parser = Parser(
        prog="equiformer2",
        description="Train, evaluate, run and compress EquiformerV2 on catalysis data.",
        epilog="`equiformer2 COMMAND --help` describes the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"equiformer2 {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    groups = {}
    for words in COMMANDS:
        *group, name = words.split()
        place = commands
        if group:
            if group[0] not in groups:
                text = GROUPS[group[0]]
                inner = commands.add_parser(group[0], help=text, description=text)
                groups[group[0]] = inner.add_subparsers(required=True, metavar="COMMAND")
            place = groups[group[0]]
        command = _load(words)
        text = _description(command)
        own = place.add_parser(name, help=text.partition("\n")[0], description=text)
        _add_arguments(own, command)
    return parser


def command_parser(words: str) -> tuple[Command, Parser]:
    """Command and its parser, from the words of its name."""
    command = _load(words)
    parser = Parser(prog=f"equiformer2 {words}", description=_description(command))
    _add_arguments(parser, command)
    return command, parser


class Completion(Command):
    """Print a completion script for a shell.

    For bash, in ~/.bashrc or once per session:

        eval "$(equiformer2 completion bash)"

    For zsh, into a folder of $fpath:

        equiformer2 completion zsh > ~/.zfunc/_equiformer2
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell to print the script for")

    def run(self, options: argparse.Namespace) -> Result:
        import shtab

        parser = build_parser()
        waiting: list[argparse.ArgumentParser] = [parser]
        while waiting:
            for action in waiting.pop()._actions:
                if isinstance(action, argparse._SubParsersAction):
                    waiting += action.choices.values()
                elif action.type in (Path, checkpoint_file) or "FILE" in str(action.metavar):
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
        text = shtab.complete(parser, shell=options.shell)
        print(text)
        return Result({"shell": options.shell, "script": text})


def _run(arguments: list[str]) -> int:
    words = next((name for n in (2, 1) if (name := " ".join(arguments[:n])) in COMMANDS), None)
    if words is None:
        build_parser().parse_args(arguments)  # help, the version, or an error with the names of all commands
        return 0
    command, parser = command_parser(words)
    options = command.parse(parser, arguments[len(words.split()) :])
    if not options.json:
        return command.run(options).status
    with contextlib.redirect_stdout(sys.stderr):
        result = command.run(options)
    document = dict(result.record)
    if "schema" not in document and not result.whole:
        document = {**header(f"{words.replace(' ', '-')}/1", result.checkpoint), **document}
    print(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False, default=str))
    return result.status


def _load(words: str) -> Command:
    file, _, name = COMMANDS[words].partition(":")
    return getattr(import_module(f"equiformer2.cli.{file}"), name)()


def _description(command: Command) -> str:
    return "\n".join(line.removeprefix("    ") for line in (type(command).__doc__ or "").splitlines()).strip()


def _add_arguments(parser: Parser, command: Command) -> None:
    command.add_arguments(parser)
    common = parser.add_argument_group("output")
    common.add_argument(
        "--json", action="store_true", help="print one JSON document; messages go to standard error"
    )
    common.add_argument("--debug", action="store_true", help="print the traceback of an error")

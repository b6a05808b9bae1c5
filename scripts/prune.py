"""Make a trained network cheaper, and say what it costs in accuracy.

    python scripts/prune.py report --checkpoint model.pt --data slabs.lmdb
    python scripts/prune.py plan --checkpoint model.pt --data slabs.lmdb --target macs=0.5 --out plan.json
    python scripts/prune.py route --checkpoint model.pt --data slabs.lmdb --target macs=0.7 --out router.json
    python scripts/prune.py apply --checkpoint model.pt --plan plan.json --out small.pt

`prune.py COMMAND --help` says more about each.
"""

import argparse
import pkgutil
import sys
from importlib import import_module

import prune_commands
from equiformer2.script import run_script, show_log


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="prune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in sorted(module.name for module in pkgutil.iter_modules(prune_commands.__path__)):
        module = import_module(f"prune_commands.{name}")
        assert module.__doc__ is not None
        command = commands.add_parser(
            name,
            help=module.__doc__.partition("\n")[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    show_log()
    options.run(options)


if __name__ == "__main__":
    run_script(main)

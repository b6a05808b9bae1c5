"""Rewrite a checkpoint of OCP or fairchem v1 as a native file.

The native file holds all the weights of the foreign one (raw, averaged or both), its normalizers and its
recorded training configuration. A summary is written beside it as JSON. See docs/checkpoints.md.

    python scripts/import_checkpoint.py --checkpoint eq2_31M_ec4_allmd.pt --out eq2_31M.pt
"""

import argparse

from equiformer2.checkpoint import import_checkpoint
from equiformer2.files import check_target, write_json
from equiformer2.script import add_overwrite_argument, run_script, show_log


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    show_log()
    for path in (options.out, f"{options.out}.json"):
        check_target(path, inputs=[options.checkpoint], overwrite=options.overwrite)
    summary = import_checkpoint(options.checkpoint, options.out, options.energy_kind)
    write_json(f"{options.out}.json", summary)
    print(
        f"{options.out}: {summary['source_format']} checkpoint with {summary['parameters']:,} parameters, "
        f"{' and '.join(summary['weights'])} weights, {summary['energy_kind']} energies "
        f"(from {summary['energy_kind_from']}); summary in {options.out}.json"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="OCP or fairchem v1 checkpoint file")
    parser.add_argument("--out", required=True, help="native file to write")
    parser.add_argument(
        "--energy-kind",
        choices=("adsorption", "total"),
        help="what the model predicts; needed when the file does not state it",
    )
    add_overwrite_argument(parser)
    return parser


if __name__ == "__main__":
    run_script(main)

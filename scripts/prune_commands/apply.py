"""Write the smaller network of a plan as an ordinary checkpoint."""

import argparse
from pathlib import Path

from equiformer2.script import add_overwrite_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="of the network that the plan was made for")
    parser.add_argument("--plan", required=True, type=Path, help="of prune.py plan")
    parser.add_argument("--out", required=True, type=Path, help="checkpoint to write")
    add_overwrite_argument(parser)


def run(options: argparse.Namespace) -> None:
    from equiformer2.files import check_target
    from equiformer2.pruning.structured.plan import PruningPlan
    from equiformer2.pruning.structured.plan_request import apply_plan

    check_target(options.out, inputs=[options.checkpoint, options.plan], overwrite=options.overwrite)
    before, after = apply_plan(options.checkpoint, PruningPlan.load(options.plan), options.out)
    print(f"{before:,} parameters became {after:,}")
    print(f"wrote {options.out}")

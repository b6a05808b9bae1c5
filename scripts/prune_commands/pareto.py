"""Compare methods at several budgets on held-out systems: error against operations and measured time.

Results that are there already are kept, so a study can be killed and continued, and with --overwrite
extended after its end. Settings of
train.py for distillation stand after --, as in -- --trainer.max_epochs=5.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prune_commands.route import add_search_arguments

if TYPE_CHECKING:
    from equiformer2.pruning.analysis.pareto import Recovery


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="of the dense network")
    parser.add_argument("--calibration", required=True, nargs="+", help="structures to calibrate on")
    parser.add_argument(
        "--held-out",
        required=True,
        nargs="+",
        metavar="NAME=PATH",
        help="systems to test on, such as dft=unseen.lmdb; different labels need different names",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the study")
    parser.add_argument(
        "--overwrite", action="store_true", help="extend a finished study: its tables are written again"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["multi", "multi_staged", "block", "random", "magnitude", "uniform"],
        help="plans (default: all of prune.py plan) and routers: route_static, route_ftp, route_atom, "
        "route_edge, route_context_only, route_distance, route_degree, route_random",
    )
    parser.add_argument(
        "--keep", nargs="+", type=float, default=[0.8, 0.7, 0.5], help="shares of the MACs that stay"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--structures", type=int, default=32, help="calibration structures (default: 32)")
    parser.add_argument("--tries", type=int, default=8, help="cuts tried per step (default: 8)")
    parser.add_argument("--repeats", type=int, default=10, help="pairs of timed calls (default: 10)")
    add_search_arguments(parser)
    parser.add_argument("--limit", type=int, help="most structures per held-out set")
    parser.add_argument("--distill-data", nargs="+", help="also distill every network, on these structures")
    parser.add_argument("--distill-val", nargs="+", help="validation structures of the distillation")
    parser.add_argument("--distill-config", action="append", default=[], help="configuration of train.py")
    parser.add_argument(
        "--scratch", action="store_true", help="also train the plans of multi from random weights"
    )
    parser.add_argument("settings", nargs="*", help="settings of train.py for distillation, after --")


def run(options: argparse.Namespace) -> None:
    from equiformer2.files import check_target
    from equiformer2.pruning.analysis.pareto import Study, StudySettings
    from equiformer2.pruning.analysis.pareto_report import markdown, missed, summarise, write_report
    from equiformer2.pruning.routing import RoutingSettings

    check_target(options.out, is_folder=True)
    given = [options.checkpoint, *options.calibration]
    given += [path for paths in _held_out(options.held_out).values() for path in paths]
    given += [*(options.distill_data or ()), *(options.distill_val or ()), *options.distill_config]
    check_target(options.out / "pareto.json", inputs=given, overwrite=options.overwrite)
    settings = StudySettings(
        methods=tuple(options.methods),
        keep=tuple(options.keep),
        seeds=tuple(options.seeds),
        structures=options.structures,
        tries=options.tries,
        repeats=options.repeats,
        routing=RoutingSettings(
            protected=None if options.protect is None else tuple(options.protect),
            population=options.population,
            generations=options.generations,
            tolerance=options.tolerance,
            steps=options.router_steps,
        ),
    )
    study = Study(
        options.checkpoint,
        options.calibration,
        _held_out(options.held_out),
        settings,
        options.out,
        _recovery(options),
        options.limit,
    )
    results = study.run()
    write_report(results, options.out)
    print(markdown(summarise(results)))
    print(missed(results))
    print(f"wrote {options.out}/pareto.md, pareto.json and pareto.png")


def _held_out(texts: list[str]) -> dict[str, list[str]]:
    from equiformer2.errors import InputError

    found: dict[str, list[str]] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not (name and path):
            raise InputError(f"--held-out {text}: give NAME=PATH, such as dft=unseen.lmdb")
        found.setdefault(name, []).append(path)
    return found


def _recovery(options: argparse.Namespace) -> "Recovery | None":
    from equiformer2.errors import InputError
    from equiformer2.pruning.analysis.pareto import Recovery

    if not options.distill_data:
        if options.scratch or options.distill_config or options.distill_val or options.settings:
            raise InputError("settings of distillation need --distill-data: structures to learn on")
        return None
    if not options.distill_val:
        raise InputError("--distill-data needs --distill-val: structures to validate on")
    configs = [text for path in options.distill_config for text in ("--config", path)]
    return Recovery(
        tuple(options.distill_data),
        tuple(options.distill_val),
        (*configs, *options.settings),
        options.scratch,
    )

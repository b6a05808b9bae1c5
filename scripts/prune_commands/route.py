"""Make a router: which atoms (or edges) each block leaves out, at a target share of the MACs.

Needs no labels. A schedule (how much every block skips) is searched, and the router of --method ftp is also
trained against the dense network. A killed call continues where it was. Beside --out, NAME.report.json says
what the router leaves and how far the answers move on the calibration structures.
"""

import argparse
from pathlib import Path

from equiformer2.script import add_overwrite_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="of the network")
    parser.add_argument("--weights", choices=("raw", "averaged"), help="default: averaged if there are any")
    parser.add_argument(
        "--data", required=True, nargs="+", help="calibration structures: LMDB files or folders of extxyz"
    )
    parser.add_argument("--out", required=True, type=Path, help="router to write (JSON)")
    parser.add_argument(
        "--method",
        default="ftp",
        help="static, ftp, uniform, atom, edge, context_only, distance, degree or random "
        "(default: %(default)s)",
    )
    parser.add_argument("--target", help="macs=0.7: the share that stays; not for context_only")
    parser.add_argument(
        "--mode", default="topk", choices=("topk", "threshold", "smooth"), help="default: %(default)s"
    )
    parser.add_argument("--width", type=float, default=0.1, help="of the gates of smooth (default: 0.1)")
    parser.add_argument("--keep-free", action="store_true", help="always compute free atoms and adsorbate")
    add_search_arguments(parser)
    parser.add_argument("--structures", type=int, default=32, help="calibration structures (default: 32)")
    parser.add_argument(
        "--force-weight", type=float, default=1.0, help="of forces in the loss, Å (default: 1)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="structures at once (default: 8)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--state", type=Path, help="where the work is kept (default: beside --out)")
    add_overwrite_argument(parser)


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """What `pareto` has, too."""
    parser.add_argument(
        "--protect",
        nargs="*",
        type=int,
        metavar="BLOCK",
        help="blocks in which routers compute all atoms; none with --protect alone "
        "(default: the first and the last)",
    )
    parser.add_argument("--population", type=int, default=16, help="of the schedule search (default: 16)")
    parser.add_argument("--generations", type=int, default=10, help="of the schedule search (default: 10)")
    parser.add_argument(
        "--tolerance", type=float, default=0.02, help="share of the MACs below the target (default: 0.02)"
    )
    parser.add_argument("--router-steps", type=int, default=200, help="of ftp's training (default: 200)")


def _check_unused(options: argparse.Namespace) -> None:
    """Refuse options that a method or mode would ignore; `context_only` has nothing to choose."""
    from equiformer2.errors import InputError

    if options.width != 0.1 and options.mode != "smooth":
        raise InputError("--width is of the gates of --mode smooth: give both, or leave it out")
    if options.router_steps != 200 and options.method != "ftp":
        raise InputError("--router-steps are of --method ftp: give both, or leave it out")
    if options.method != "context_only":
        return
    given = {
        "--mode": options.mode != "topk",
        "--keep-free": options.keep_free,
        "--protect": options.protect is not None,
    }
    for name, used in given.items():
        if used:
            raise InputError(f"{name} has no meaning for context_only, which asks the tags: leave it out")


def run(options: argparse.Namespace) -> None:
    from equiformer2.files import check_target, write_json
    from equiformer2.pruning.routing import RoutingSettings, save_router
    from equiformer2.pruning.routing.make_router import RouteRequest, make_router

    _check_unused(options)
    report = options.out.with_name(f"{options.out.stem}.report.json")
    state = options.state or options.out.with_name(f"{options.out.stem}.state.pt")
    inputs = [options.checkpoint, *options.data]
    for path in (options.out, report):
        check_target(path, inputs=inputs, overwrite=options.overwrite)
    check_target(state, inputs=[*inputs, options.out])
    request = RouteRequest(
        checkpoint=options.checkpoint,
        data=tuple(options.data),
        method=options.method,
        target=options.target,
        settings=RoutingSettings(
            mode=options.mode,
            width=options.width,
            keep_free=options.keep_free,
            protected=None if options.protect is None else tuple(options.protect),
            population=options.population,
            generations=options.generations,
            tolerance=options.tolerance,
            steps=options.router_steps,
        ),
        weights=options.weights,
        structures=options.structures,
        force_weight=options.force_weight,
        batch_size=options.batch_size,
        device=options.device,
        seed=options.seed,
    )
    made = make_router(request, state)
    write_json(report, made.to_dict(request), make_folder=True)
    save_router(options.out, made.router)
    print(made)
    print(f"wrote {options.out} and {report}")

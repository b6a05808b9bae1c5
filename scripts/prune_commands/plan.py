"""Find which heads, channels, orders and branches to keep for a target, without training.

A search continues where it was killed. Targets are shares that stay of the multiply-accumulates (macs=0.5),
the parameters (parameters=0.5) or the time (latency=0.6). Of several, all are reached.
"""

import argparse
from pathlib import Path

from equiformer2.script import add_overwrite_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="of the dense network")
    parser.add_argument("--weights", choices=("raw", "averaged"), help="default: averaged if there are any")
    parser.add_argument(
        "--data", required=True, nargs="+", help="calibration structures: LMDB files or folders of extxyz"
    )
    parser.add_argument("--out", required=True, type=Path, help="plan to write (JSON)")
    parser.add_argument(
        "--target", required=True, nargs="+", help="macs=0.5, parameters=0.5, latency=0.6 or several of them"
    )
    parser.add_argument(
        "--method",
        default="multi",
        help="multi, multi_staged, block, random, magnitude or uniform (default: %(default)s)",
    )
    parser.add_argument("--structures", type=int, default=32, help="calibration structures (default: 32)")
    parser.add_argument("--tries", type=int, default=8, help="cuts tried per step (default: 8)")
    parser.add_argument(
        "--importance",
        default="michel",
        choices=("michel", "taylor"),
        help="by which a search ranks heads and channels before it tries cuts (default: %(default)s)",
    )
    parser.add_argument("--sphere", action="store_true", help="also cut the channels of the atoms' features")
    parser.add_argument(
        "--force-weight", type=float, default=1.0, help="of forces in the loss, Å (default: 1)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="structures at once (default: 8)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--state", type=Path, help="where a search keeps its state (default: beside --out)")
    add_overwrite_argument(parser)


def run(options: argparse.Namespace) -> None:
    from equiformer2.files import check_target
    from equiformer2.pruning.structured.plan_request import PlanRequest, make_plan

    inputs = [options.checkpoint, *options.data]
    state = options.state or options.out.with_name(f"{options.out.stem}.state.json")
    check_target(options.out, inputs=inputs, overwrite=options.overwrite)
    check_target(state, inputs=[*inputs, options.out])
    request = PlanRequest(
        checkpoint=options.checkpoint,
        data=tuple(options.data),
        targets=tuple(options.target),
        method=options.method,
        weights=options.weights,
        structures=options.structures,
        tries=options.tries,
        sphere=options.sphere,
        importance=options.importance,
        force_weight=options.force_weight,
        batch_size=options.batch_size,
        device=options.device,
        seed=options.seed,
    )
    result = make_plan(request, state)
    result.plan.save(options.out)
    print(result)
    print(f"wrote {options.out}")

"""Commands that analyze and compress a trained network: `equiformer2 prune …`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    Options,
    add_calibration_arguments,
    add_checkpoint_arguments,
    add_device_argument,
    add_model_arguments,
    add_overwrite_argument,
    checkpoint_file,
    parse_checked,
    random_seed,
)
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_json
from equiformer2.script import header, show_log

if TYPE_CHECKING:
    from equiformer2.pruning.analysis.pareto import Recovery
    from equiformer2.pruning.routing import RoutingSettings


def _add_structures_argument(parser: Parser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="calibration structures: LMDB files, folders of shards, OC20's extended XYZ files, or files "
        "that ASE reads",
    )


def _add_search_arguments(parser: Parser, out: str) -> None:
    """Add what `plan` and `route` share: network, structures, loss, device, output and state."""
    add_checkpoint_arguments(parser)
    _add_structures_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help=out)
    parser.add_argument(
        "--force-weight",
        type=float,
        default=1.0,
        help="weight of forces in the loss, Å (default: %(default)s)",
    )
    add_calibration_arguments(parser, batch_size=2)
    add_device_argument(parser)
    parser.add_argument("--state", type=Path, help="file for resumable search state (default: beside --out)")
    add_overwrite_argument(parser)


def _add_schedule_arguments(parser: Options) -> None:
    """Add what `route` and `pareto` share: the search of how much every block skips."""
    parser.add_argument(
        "--protect",
        nargs="*",
        type=int,
        default=[],
        metavar="BLOCK",
        help="numbers of the blocks in which routers compute all atoms (default: none)",
    )
    parser.add_argument(
        "--population",
        type=int,
        default=16,
        help="number of schedules per generation of the search (default: %(default)s)",
    )
    parser.add_argument(
        "--generations",
        type=int,
        default=8,
        help="number of generations of the search (default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        help="largest distance of the MACs below the target, as a share (default: %(default)s)",
    )
    parser.add_argument(
        "--router-steps",
        type=int,
        default=200,
        help="number of training steps of the router of method ftp (default: %(default)s)",
    )


def _routing_settings(options: argparse.Namespace, **more: Any) -> "RoutingSettings":
    from equiformer2.pruning.routing import RoutingSettings

    return RoutingSettings(
        protected=tuple(options.protect),
        population=options.population,
        generations=options.generations,
        tolerance=options.tolerance,
        steps=options.router_steps,
        **more,
    )


class Report(Command):
    """Analyze where a network spends its time and what it could do without, before anything is cut.

    Per block and tag: how much the block changes the features of the atoms (cosine) and how sharply it
    attends (entropy). Per head and channel: importance. Per part: operations and measured time. And what
    inference leaves out already because nobody reads it. Tables are printed and written with a figure to
    --out.
    """

    def add_arguments(self, parser: Parser) -> None:
        add_model_arguments(parser, adapter=False)
        _add_structures_argument(parser)
        parser.add_argument(
            "--out", default="runs/pruning_report", help="output folder (default: %(default)s)"
        )
        add_calibration_arguments(parser, batch_size=4)
        parser.add_argument(
            "--objective",
            choices=("probe", "labels"),
            default="probe",
            help="objective of the importance: the outputs along random directions, or the loss "
            "(default: %(default)s)",
        )
        parser.add_argument(
            "--repeats", type=int, default=10, help="number of timed passes (default: %(default)s)"
        )
        add_overwrite_argument(parser, "replace an earlier report in --out")

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.checkpoint import load_checkpoint
        from equiformer2.checkpoint.compact import check_not_stored
        from equiformer2.inference import Predictor
        from equiformer2.inference.record import claim_folder
        from equiformer2.pruning.analysis.redundancy_report import RECORD, make_report
        from equiformer2.pruning.analysis.report_tables import print_report
        from equiformer2.pruning.calibration_data import labelled_energies, read_structures

        show_log()
        check_target(Path(options.out) / RECORD, inputs=[options.checkpoint, *options.data])
        folder = claim_folder(options.out, RECORD, options.overwrite)
        checkpoint = load_checkpoint(options.checkpoint, options.weights, options.energy_kind)
        check_not_stored(checkpoint.model, options.checkpoint)
        predictor = Predictor(
            checkpoint, options.device, precision=options.precision, backend=options.backend
        )
        kind = checkpoint.energy_kind
        if options.objective == "labels" and not labelled_energies(options.data, kind, options.energy_kind):
            raise InputError(
                f"not all of the data are labelled with {kind} energies: use --objective probe, "
                "or name the kind of energy of data that do not say it with --energy-kind"
            )
        report = make_report(
            predictor,
            read_structures(options.data, options.structures, options.seed),
            batch_size=options.batch_size,
            objective=options.objective,
            repeats=options.repeats,
            seed=options.seed,
            source={"checkpoint": options.checkpoint, "data": options.data},
        )
        print_report(report)
        for path in report.write(folder):
            print(f"wrote {path}")
        return Result(read_json(folder / RECORD), checkpoint=options.checkpoint)


class Plan(Command):
    """Find the heads, channels, orders and branches to keep for a target, without training.

    A search continues where it was killed. Targets are shares that stay of the multiply-accumulates
    (macs=0.5), the parameters (parameters=0.5) or the time (latency=0.6). Of several, all are reached.
    The time is added up from parts; exit status 3 if the whole pruned network takes longer than the target.
    """

    def add_arguments(self, parser: Parser) -> None:
        _add_search_arguments(parser, "plan to write (JSON)")
        parser.add_argument(
            "--target",
            required=True,
            nargs="+",
            help="targets such as macs=0.5, parameters=0.5 or latency=0.6, as shares that stay",
        )
        parser.add_argument(
            "--method",
            default="multi",
            help="search: multi (all dimensions at once) or multi_staged (one after the other); baselines: "
            "block, random, magnitude, uniform (default: %(default)s)",
        )
        parser.add_argument(
            "--tries", type=int, default=8, help="number of cuts tried per step (default: %(default)s)"
        )
        parser.add_argument(
            "--importance",
            default="michel",
            choices=("michel", "taylor"),
            help="measure by which a search ranks heads and channels before it tries cuts "
            "(default: %(default)s)",
        )
        parser.add_argument(
            "--sphere", action="store_true", help="also cut the channels of the atoms' features"
        )

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.pruning.structured.plan_request import PlanRequest, make_plan

        show_log()
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
        planned = make_plan(request, state)
        planned.plan.save(options.out)
        print(planned)
        print(f"wrote {options.out}")
        record = {"file": str(options.out), "plan": read_json(options.out), "missed": planned.missed}
        return Result(record, 0 if planned.missed is None else 3, options.checkpoint)


class Apply(Command):
    """Write the smaller network of a plan as an ordinary checkpoint."""

    def add_arguments(self, parser: Parser) -> None:
        add_checkpoint_arguments(parser, weights=False)
        parser.add_argument(
            "--plan", required=True, type=Path, help="plan of `equiformer2 prune plan` for this network"
        )
        parser.add_argument("--out", required=True, type=Path, help="checkpoint to write")
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.pruning.structured.plan import PruningPlan
        from equiformer2.pruning.structured.plan_request import apply_plan

        show_log()
        check_target(options.out, inputs=[options.checkpoint, options.plan], overwrite=options.overwrite)
        before, after = apply_plan(options.checkpoint, PruningPlan.load(options.plan), options.out)
        print(f"{before:,} parameters became {after:,}")
        print(f"wrote {options.out}")
        record = {"file": str(options.out), "parameters_before": before, "parameters": after}
        return Result(record, checkpoint=str(options.out))


class Route(Command):
    """Make a router: the atoms (or edges) that each block leaves out, at a target share of the MACs.

    Needs no labels. A schedule (how much every block skips) is searched, and the router of --method ftp is
    also trained against the dense network. A killed call continues where it was. Beside --out,
    NAME.report.json has the share that the router leaves and how far the answers move on the calibration
    structures. Exit status 3: more than the target is left, as it can be with --mode threshold and smooth.
    """

    def add_arguments(self, parser: Parser) -> None:
        _add_search_arguments(parser, "router to write (JSON)")
        parser.add_argument(
            "--method",
            default="static",
            help="method: static (a fixed order of the atoms at a searched schedule), ftp (trained), atom or "
            "edge (by attention), atom_importance (atom without its similarity stage), or context_only (no "
            "budget) (default: %(default)s)",
        )
        parser.add_argument("--target", help="share of the MACs that stays, macs=0.7; not for context_only")
        parser.add_argument(
            "--mode",
            default="topk",
            choices=("topk", "threshold", "smooth"),
            help="choice of the atoms: a fixed number, by score, or by smooth gates (default: %(default)s)",
        )
        parser.add_argument(
            "--width",
            type=float,
            default=0.1,
            help="width of the gates of mode smooth (default: %(default)s)",
        )
        parser.add_argument(
            "--keep-free", action="store_true", help="always compute free atoms and the adsorbate"
        )
        _add_schedule_arguments(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.pruning.routing import save_router
        from equiformer2.pruning.routing.route_request import RouteRequest, make_router

        show_log()
        self._check_unused(options)
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
            settings=_routing_settings(
                options, mode=options.mode, width=options.width, keep_free=options.keep_free
            ),
            weights=options.weights,
            structures=options.structures,
            force_weight=options.force_weight,
            batch_size=options.batch_size,
            device=options.device,
            seed=options.seed,
        )
        routed = make_router(request, state)
        record = {**header("prune-route/1", options.checkpoint), **routed.to_dict(request)}
        write_json(report, record, make_folder=True)
        save_router(options.out, routed.router)
        print(routed)
        print(f"wrote {options.out} and {report}")
        return Result(record, status=0 if routed.missed is None else 3)

    def _check_unused(self, options: argparse.Namespace) -> None:
        """Refuse options that a method or mode would ignore; `context_only` has nothing to choose."""
        if options.width != 0.1 and options.mode != "smooth":
            raise InputError("--width is of the gates of --mode smooth: give both, or leave it out")
        if options.router_steps != 200 and options.method != "ftp":
            raise InputError("--router-steps are of --method ftp: give both, or leave it out")
        if options.method != "context_only":
            return
        given = {
            "--mode": options.mode != "topk",
            "--keep-free": options.keep_free,
            "--protect": bool(options.protect),
        }
        for name, used in given.items():
            if used:
                raise InputError(f"{name} has no meaning for context_only, which asks the tags: leave it out")


class Quantize(Command):
    """Store the matrices of a network in fewer bits, with a limit of bytes or of time, without training.

    A Bayesian search chooses float32, bf16, int8 or int4 for every part of the network, and whether units are
    pruned first, so that energies and forces on the calibration structures change least. Targets are shares
    of the float32 network: bytes=0.4 of the file, latency=0.5 of the time of a force call. --plan and
    --uniform take given precisions in place of a search. A killed call continues where it was.

    Under a limit of time alone, attention and feed-forward networks may multiply in bfloat16, where the
    device has instructions for it and is measured to be faster so; otherwise time is saved by pruning.

    Rotations, grids, norms, biases, the attention's softmax, sums and the last layers stay float32. The file
    is an ordinary checkpoint. Beside it, NAME.pt.json has its size on disk and in memory, the bits of every
    module, and errors, time and equivariance measured on structures that the search did not see, where --data
    holds enough. Exit status 3: a limit was missed, or the error under rotations grew by more than a tenth.
    """

    def add_arguments(self, parser: Parser) -> None:
        add_checkpoint_arguments(parser)
        _add_structures_argument(parser)
        parser.add_argument("--out", required=True, type=Path, help="checkpoint to write")
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "--target", nargs="+", help="targets bytes=0.4 or latency=0.5, shares of the float32 network"
        )
        what.add_argument("--plan", type=Path, help="precision plan to use in place of a search (JSON)")
        what.add_argument(
            "--uniform",
            choices=("float32", "bf16", "int8", "int4"),
            help="precision of all matrices that may have it, in place of a search",
        )
        parser.add_argument(
            "--keep",
            nargs="*",
            type=float,
            default=[0.9, 0.8],
            metavar="SHARE",
            help="shares of the parameters that pruned networks keep, among which the search chooses under a "
            "limit of bytes; without a share nothing is pruned (default: 0.9 0.8)",
        )
        parser.add_argument(
            "--minutes",
            type=float,
            default=15.0,
            help="approximate time of the search, from which its number of trials follows (default: "
            "%(default)s)",
        )
        parser.add_argument("--trials", type=int, help="number of trials, in place of --minutes")
        parser.add_argument(
            "--max-minutes",
            type=float,
            default=25.0,
            help="time after which the search ends with the best trial so far, whatever is left of it "
            "(default: %(default)s)",
        )
        parser.add_argument(
            "--recover",
            nargs="?",
            const=4,
            type=int,
            metavar="RANK",
            help="write NAME.adapter.pt, too: low-rank maps that take back a part of what rounding to int8 "
            "and int4 changes, for --adapter and to train on with finetune --adapter-start (default rank: 4)",
        )
        parser.add_argument(
            "--held-out",
            type=int,
            default=64,
            help="maximum number of other structures on which the result is measured (default: %(default)s)",
        )
        parser.add_argument(
            "--force-weight",
            type=float,
            default=1.0,
            help="weight of forces in the loss, Å (default: %(default)s)",
        )
        add_calibration_arguments(parser, batch_size=2)
        add_device_argument(parser)
        parser.add_argument(
            "--state", type=Path, help="file for resumable search state (default: beside --out)"
        )
        add_overwrite_argument(parser)

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        of_searches = ("--keep", "--minutes", "--trials", "--max-minutes", "--force-weight", "--state")
        needs = [(option, "--target") for option in of_searches]
        return parse_checked(parser, arguments, needs=needs)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.pruning.precision.plan import PrecisionPlan
        from equiformer2.pruning.precision.quantize_request import (
            QuantizeRequest,
            default_adapter_path,
            quantize,
        )

        show_log()
        report = options.out.with_name(f"{options.out.name}.json")
        state = options.state or options.out.with_name(f"{options.out.stem}.state.json")
        inputs = [options.checkpoint, *options.data, *([options.plan] if options.plan else [])]
        adapter = default_adapter_path(options.out)
        for path in (options.out, report, *([] if options.recover is None else [adapter])):
            check_target(path, inputs=inputs, overwrite=options.overwrite)
        check_target(state, inputs=[*inputs, options.out, report, adapter])
        request = QuantizeRequest(
            checkpoint=options.checkpoint,
            data=tuple(options.data),
            targets=tuple(options.target or ()),
            plan=None if options.plan is None else PrecisionPlan.load(options.plan),
            uniform=options.uniform,
            keep=tuple(options.keep),
            minutes=options.minutes,
            trials=options.trials,
            max_minutes=options.max_minutes,
            recover=options.recover,
            weights=options.weights,
            structures=options.structures,
            held_out=options.held_out,
            force_weight=options.force_weight,
            batch_size=options.batch_size,
            device=options.device,
            seed=options.seed,
        )
        found = quantize(request, options.out, state, adapter_path=adapter)
        record = {**header("prune-quantize/1", options.checkpoint), "file": str(options.out), **found}
        write_json(report, record)
        self._print(found)
        print(f"wrote {options.out} and {report}")
        return Result(record, status=3 if found["missed"] else 0)

    def _print(self, found: dict[str, Any]) -> None:
        bits = list(found["modules"].values())
        counts = ", ".join(f"{bits.count(n)} of {n} bits" for n in sorted(set(bits)))
        print(f"matrices: {counts}; pruned: {'yes' if 'pruning' in found['plan'] else 'no'}")
        products = found["plan"].get("products")
        if products:
            print(f"products in bfloat16: {', '.join(products)}")
        search = found["search"]
        if search is not None and len(search["trials"]) < search["trials_planned"]:
            print(f"out of time: {len(search['trials'])} of {search['trials_planned']} trials were made")
        print(
            f"file: {found['bytes']:,} bytes, {found['bytes_ratio']:.1%} of {found['bytes_float32']:,} in "
            f"float32; in memory after a call: {found['resident_bytes']:,} bytes instead of "
            f"{found['resident_bytes_dense']:,}"
        )
        where = "the calibration structures" if found["measured_on"]["calibration"] else "other structures"
        for key, text, unit in (
            ("force_change_eV_A", "forces change by", "eV/Å"),
            ("energy_change_eV", "energies change by", "eV"),
            ("force_mae_ratio", "force MAE against the labels, times that of float32:", ""),
            ("equivariance_ratio", "error under rotations, times that of float32:", ""),
            ("ms_ratio", "time of a force call, times that of float32:", ""),
        ):
            if found[key] is not None:
                print(f"on {where}, {text} {found[key]:.4f} {unit}".rstrip())
        recovery = found["recovery"]
        if recovery is not None:
            print(
                f"with {recovery['adapter']} ({recovery['bytes']:,} bytes), matrices are off by "
                f"{recovery['weight_error']:.2%} instead of {recovery['weight_error_plain']:.2%}"
            )
            if recovery["force_change_eV_A"] is not None:
                print(
                    f"and forces change by {recovery['force_change_eV_A']:.4f} eV/Å instead of "
                    f"{recovery['plain']['force_change_eV_A']:.4f}"
                )
        for sentence in found["missed"]:
            print(f"missed: {sentence}")


def _training_settings(configs: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Words of a training command line from `--config` options and the words after `--`."""
    return [text for path in configs for text in ("--config", path)] + list(settings)


class Distill(Command):
    """Train a pruned network on the energies and forces of the dense one; needs no labels.

    Keys of `equiformer2 train` stand after --, as in -- --trainer.max_epochs=5. An interrupted call with the
    same --out is continued.
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "--student", required=True, type=checkpoint_file, help="checkpoint of the pruned network"
        )
        parser.add_argument(
            "--teacher", required=True, type=checkpoint_file, help="checkpoint of the dense network"
        )
        parser.add_argument("--data", required=True, nargs="+", help="files of structures to learn on")
        parser.add_argument(
            "--val", required=True, nargs="+", help="files of structures to validate on, of other systems"
        )
        parser.add_argument("--out", required=True, type=Path, help="output folder")
        parser.add_argument(
            "--config",
            action="append",
            default=[],
            help="configuration of `equiformer2 train`, such as pruning/distill; may be repeated",
        )
        parser.add_argument(
            "--from-scratch", action="store_true", help="start from random weights, as a baseline"
        )
        add_device_argument(parser)
        parser.add_argument("settings", nargs="*", help="keys of `equiformer2 train`, after --")

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.pruning.recovery.distillation import distill

        show_log()
        given = [options.student, options.teacher, *options.data, *options.val, *options.config]
        for name in ("train.lmdb", "val.lmdb", "run/checkpoints/best.pt", "run/checkpoints/last.pt"):
            check_target(options.out / name, inputs=given)
        folder = distill(
            options.student,
            options.teacher,
            options.data,
            options.val,
            options.out,
            _training_settings(options.config, options.settings),
            from_scratch=options.from_scratch,
            device=options.device,
        )
        best = folder / "checkpoints" / "best.pt"
        print(f"wrote {best} and last.pt")
        return Result({"run": str(folder), "file": str(best)}, checkpoint=str(best))


class Grid(Command):
    """Find the smallest S2 grids that keep a network's answers within a tolerance, and write it with them.

    Not lossless: the table shows how far forces and energies drift, and how well they turn with the
    structure. Evaluate the new checkpoint before you use it.
    """

    def add_arguments(self, parser: Parser) -> None:
        add_model_arguments(parser, adapter=False)
        _add_structures_argument(parser)
        parser.add_argument(
            "--out", required=True, type=Path, help="checkpoint to write; a .json is written beside it"
        )
        parser.add_argument(
            "--tol",
            type=float,
            default=1e-3,
            help="largest relative deviation of the answers (default: %(default)s)",
        )
        parser.add_argument(
            "--measure",
            choices=("drift", "rotation"),
            default="drift",
            help="reference of the deviation: the network as it is, or a rotation of the structure "
            "(default: %(default)s)",
        )
        add_calibration_arguments(parser, structures=8, batch_size=4)
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.checkpoint import load_checkpoint
        from equiformer2.checkpoint.compact import check_not_stored
        from equiformer2.inference import Predictor
        from equiformer2.inference.predictor import matmul_precision
        from equiformer2.pruning.calibration_data import read_structures
        from equiformer2.pruning.structured.grid_tuning import GridRow, tune_grid, write_with_grids

        show_log()
        file = options.out.with_suffix(".json")
        for path in (options.out, file):
            check_target(path, inputs=[options.checkpoint, *options.data], overwrite=options.overwrite)
        checkpoint = load_checkpoint(options.checkpoint, options.weights, options.energy_kind)
        check_not_stored(checkpoint.model, options.checkpoint)
        predictor = Predictor(
            checkpoint, options.device, precision=options.precision, backend=options.backend
        )
        structures = read_structures(options.data, options.structures, options.seed)
        print(f"{'attention':>11} {'feed-forward':>13} {'drift':>9} {'rotated':>9} {'operations':>11}")

        def show(row: GridRow) -> None:
            attn, ffn = (f"{a} x {b}" for a, b in (row.resolution.attn, row.resolution.ffn))
            print(f"{attn:>11} {ffn:>13} {row.drift:9.1e} {row.rotation:9.1e} {row.macs:11.3f}", flush=True)

        with matmul_precision(options.precision, predictor.device):
            choice = tune_grid(
                predictor.model,
                structures,
                options.tol,
                measure=options.measure,
                batch_size=options.batch_size,
                seed=options.seed,
                progress=show,
            )
        print("chosen:")
        show(choice.rows[-1])
        write_with_grids(options.checkpoint, options.energy_kind, choice, options.out)
        record = {
            **header("prune-grid/1", options.checkpoint),
            "checkpoint": options.checkpoint,
            "data": options.data,
            **choice.to_dict(),
        }
        write_json(file, record)
        print(f"wrote {options.out} and {file}")
        return Result(record)


class Pareto(Command):
    """Compare methods at several budgets on held-out systems: error against operations and measured time.

    Results that are there already are kept, so a study can be killed and continued, and with --overwrite
    extended after its end. Keys of `equiformer2 train` for distillation stand after --, as in
    -- --trainer.max_epochs=5.
    """

    def add_arguments(self, parser: Parser) -> None:
        add_checkpoint_arguments(parser, weights=False)
        parser.add_argument(
            "--calibration", required=True, nargs="+", help="files of structures to calibrate on"
        )
        parser.add_argument(
            "--held-out",
            required=True,
            nargs="+",
            metavar="NAME=PATH",
            help="names and files of systems to test on, such as dft=unseen.lmdb; different labels need "
            "different names",
        )
        parser.add_argument("--out", required=True, type=Path, help="folder of the study")
        add_overwrite_argument(parser, "extend a finished study: its tables are written again")
        parser.add_argument(
            "--methods",
            nargs="+",
            default=["multi", "multi_staged", "block", "random", "magnitude", "uniform"],
            help="methods of `equiformer2 prune plan`, its baselines (default: all) and routers: "
            "route_static, route_ftp, route_atom, route_atom_importance, route_edge, route_context_only",
        )
        parser.add_argument(
            "--keep",
            nargs="+",
            type=float,
            default=[0.8, 0.7, 0.5],
            help="shares of the MACs that stay (default: 0.8 0.7 0.5)",
        )
        parser.add_argument(
            "--seeds", nargs="+", type=random_seed, default=[0, 1, 2], help="random seeds (default: 0 1 2)"
        )
        parser.add_argument(
            "--structures",
            type=int,
            default=32,
            help="maximum number of calibration structures (default: %(default)s)",
        )
        parser.add_argument(
            "--tries", type=int, default=8, help="number of cuts tried per step (default: %(default)s)"
        )
        parser.add_argument(
            "--repeats", type=int, default=10, help="number of pairs of timed calls (default: %(default)s)"
        )
        _add_schedule_arguments(parser)
        parser.add_argument("--limit", type=int, help="maximum number of structures per held-out set")
        parser.add_argument(
            "--distill-data", nargs="+", help="files of structures on which every network is also distilled"
        )
        parser.add_argument(
            "--distill-val", nargs="+", help="files of structures to validate distillation on"
        )
        parser.add_argument(
            "--distill-config", action="append", default=[], help="configuration of `equiformer2 train`"
        )
        parser.add_argument(
            "--scratch", action="store_true", help="also train the plans of multi from random weights"
        )
        parser.add_argument(
            "settings", nargs="*", help="keys of `equiformer2 train` for distillation, after --"
        )

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.pruning.analysis.pareto import Study, StudySettings
        from equiformer2.pruning.analysis.pareto_report import markdown, missed, summarise, write_report

        show_log()
        held_out = self._held_out(options.held_out)
        check_target(options.out, is_folder=True)
        given = [
            options.checkpoint,
            *options.calibration,
            *(path for paths in held_out.values() for path in paths),
        ]
        given += [*(options.distill_data or ()), *(options.distill_val or ()), *options.distill_config]
        check_target(options.out / "pareto.json", inputs=given, overwrite=options.overwrite)
        settings = StudySettings(
            methods=tuple(options.methods),
            keep=tuple(options.keep),
            seeds=tuple(options.seeds),
            structures=options.structures,
            tries=options.tries,
            repeats=options.repeats,
            routing=_routing_settings(options),
        )
        study = Study(
            options.checkpoint,
            options.calibration,
            held_out,
            settings,
            options.out,
            self._recovery(options),
            options.limit,
        )
        results = study.run()
        write_report(results, options.out, options.checkpoint)
        print(markdown(summarise(results)))
        print(missed(results))
        print(f"wrote {options.out}/pareto.md, pareto.json and pareto.png")
        return Result(read_json(options.out / "pareto.json"), checkpoint=options.checkpoint)

    def _held_out(self, texts: Sequence[str]) -> dict[str, list[str]]:
        paths: dict[str, list[str]] = {}
        for text in texts:
            name, _, path = text.partition("=")
            if not (name and path):
                raise InputError(f"--held-out {text}: give NAME=PATH, such as dft=unseen.lmdb")
            paths.setdefault(name, []).append(path)
        return paths

    def _recovery(self, options: argparse.Namespace) -> "Recovery | None":
        from equiformer2.pruning.analysis.pareto import Recovery

        if not options.distill_data:
            if options.scratch or options.distill_config or options.distill_val or options.settings:
                raise InputError("settings of distillation need --distill-data: structures to learn on")
            return None
        if not options.distill_val:
            raise InputError("--distill-data needs --distill-val: structures to validate on")
        return Recovery(
            tuple(options.distill_data),
            tuple(options.distill_val),
            tuple(_training_settings(options.distill_config, options.settings)),
            options.scratch,
        )

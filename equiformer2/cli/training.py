"""Commands around training: train, report, checkpoint import, demo."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    ENERGY_KINDS,
    add_checkpoint_arguments,
    add_overwrite_argument,
    checkpoint_file,
    parse_checked,
)
from equiformer2.errors import InputError
from equiformer2.files import check_target, write_bytes, write_json
from equiformer2.script import header, show_log

if TYPE_CHECKING:
    from equiformer2.checkpoint.checkpoint import SeenData

MAIN_KEYS = {
    "config": "YAML file of a run, or the name of a shipped one such as oc20_2m_83M; later files win",
    "name": "name of the run's folder (default: name of the configuration file)",
    "runs_dir": "folder in which run folders are made (default: runs)",
    "seed": "random seed of initial weights, order of the data and dropout (default: 0)",
    "init_from": "checkpoint whose weights a new run starts from, for fine-tuning",
    "ckpt_path": "Lightning checkpoint to resume from; last is the run's own, auto that one if it is there",
    "data.train": "training structures: LMDB file, folder of shards, or a small set of other files that ASE "
    "reads",
    "data.val": "validation structures, likewise (default: systems held out of data.train)",
    "data.energy_kind": "kind of the energies, adsorption or total, for data that does not declare it",
    "data.batch_size": "maximum number of structures per batch and process",
    "data.num_workers": "number of loader processes",
    "data.tasks": "data sets to train together, by name; for experts (docs/experts.md)",
    "experts.num_experts": "number of experts of a network for several data sets (default: 0, none)",
    "model.num_layers": "number of blocks",
    "model.lmax": "maximum degree of the features",
    "optim.lr": "largest learning rate, reached at the end of the warm-up",
    "task.energy_coefficient": "weight of the energy error in the loss",
    "task.force_coefficient": "weight of the force error in the loss",
    "trainer.max_epochs": "number of epochs",
    "trainer.devices": "number of devices, or their indices",
    "trainer.precision": "32-true, bf16-mixed or 64-true",
    "wandb.project": "Weights & Biases project to log to",
}
"""Keys of a run that `train --help` shows -> their help."""


class Train(Command):
    """Train or fine-tune EquiformerV2.

    A run is described by a YAML file, and every key of it can be changed on the command line:

        equiformer2 train --config oc20_2m_83M --data.train train_lmdb --data.val val_lmdb --name shallow
            --model.num_layers 4
        equiformer2 train --data.train my.lmdb   # own data: configuration own_data

    The keys below are those that matter most. `equiformer2 train --help-all` lists all of them, and
    `equiformer2 train --config FILE --print_config` prints the values that a run would have.
    """

    def add_arguments(self, parser: Parser) -> None:
        for key, text in MAIN_KEYS.items():
            parser.add_argument(f"--{key}", metavar="FILE|NAME" if key == "config" else "VALUE", help=text)
        parser.add_argument("--help-all", action="store_true", help="list all keys and exit")
        parser.add_argument("--print_config", action="store_true", help="print the configuration and exit")

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        """Keep the keys as they are: `training.configuration` knows all of them."""
        if {"-h", "--help"} & set(arguments):
            parser.print_help()
            sys.exit(0)
        keys = [argument for argument in arguments if argument != "--json"]
        return argparse.Namespace(keys=keys, json="--json" in arguments)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.training.configuration import build_parser, parse
        from equiformer2.training.run import train

        if "--help-all" in options.keys:
            build_parser().print_help()
            print("\nOptions of the command line alone: --help, --help-all, --json, --debug.")
            return Result()
        folder = train(parse(options.keys))
        print(f"done: {folder}")
        last = folder / "checkpoints" / "last.pt"
        return Result({"run": str(folder)}, checkpoint=str(last) if last.exists() else None)


class ReportRun(Command):
    """Report how a run's validation errors fell, and its checkpoint's errors system by system."""

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "--runs", required=True, nargs="+", type=Path, help="run folders of `equiformer2 train`, in order"
        )
        add_checkpoint_arguments(parser)
        parser.add_argument("--data", required=True, nargs="+", help="LMDB files to evaluate it on")
        parser.add_argument(
            "--out", required=True, type=Path, help="path without ending for the .md, .json and .png"
        )
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.inference import Predictor
        from equiformer2.training.evaluation import open_dataset
        from equiformer2.training.learning_curve import (
            draw_learning_curve,
            errors_by_system,
            markdown,
            read_validations,
        )

        for ending in (".md", ".json", ".png"):
            target = options.out.with_suffix(ending)
            check_target(target, inputs=[options.checkpoint, *options.data], overwrite=options.overwrite)
        predictor = Predictor(options.checkpoint, weights=options.weights)
        runs = {run.name: read_validations(run) for run in options.runs}
        systems = {
            Path(path).stem: errors_by_system(predictor, open_dataset(path, predictor, None))
            for path in options.data
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        first = next(iter(systems.values()))
        frames = sum(item.frames for item in first.values())
        zero = sum(item.zero_force_mae * item.frames for item in first.values()) / frames
        draw_learning_curve(runs, zero, options.out.with_suffix(".png"))
        record = {
            **header("report/1", options.checkpoint),
            "runs": {name: [asdict(v) for v in validations] for name, validations in runs.items()},
            "systems": {
                data: {sid: asdict(item) for sid, item in errors.items()} for data, errors in systems.items()
            },
        }
        write_json(options.out.with_suffix(".json"), record)
        text = markdown(runs, systems, f"{options.out.name}.png")
        write_bytes(options.out.with_suffix(".md"), text.encode())
        print(text)
        return Result(record)


class ImportCheckpoint(Command):
    """Rewrite a checkpoint of OCP or fairchem v1 as a native file.

    The native file holds all the weights of the foreign one (raw, averaged or both), its normalizers and its
    recorded training configuration. A summary is written beside it as JSON. See docs/checkpoints.md.

        equiformer2 checkpoint import --checkpoint eq2_31M_ec4_allmd.pt --out eq2_31M.pt

    With --weights one set of weights is kept, also of a native file, whose copy is half as large:

        equiformer2 checkpoint import --checkpoint last.pt --weights averaged --out my.pt

    With --familiarity the file tells what it was trained on, so that structures unlike that are named
    wherever it is used (docs/own_data.md, "When not to trust"):

        equiformer2 checkpoint import --checkpoint my.pt --familiarity train.lmdb --held-out val.lmdb \
            --out knowing.pt
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "--checkpoint",
            required=True,
            type=checkpoint_file,
            metavar="FILE|NAME",
            help="OCP or fairchem v1 checkpoint file; with --weights also a native one",
        )
        parser.add_argument("--out", required=True, help="native checkpoint file to write")
        parser.add_argument(
            "--energy-kind",
            choices=ENERGY_KINDS,
            help="kind of energy that the model predicts, for a file that does not state it",
        )
        parser.add_argument(
            "--weights",
            choices=("raw", "averaged"),
            help="the one set of weights to keep (default: all that the file holds)",
        )
        parser.add_argument(
            "--familiarity",
            nargs="+",
            type=Path,
            metavar="DATA",
            help="LMDB files, small sets of other files that ASE reads, or folders of them, that the "
            "checkpoint was trained on: their elements, pairs, adsorbates and surroundings of atoms are "
            "stored with it",
        )
        parser.add_argument(
            "--held-out",
            nargs="+",
            type=Path,
            metavar="DATA",
            help="such files of systems that it was not trained on and is trusted for, on which the distance "
            "of familiar surroundings is calibrated",
        )
        parser.add_argument(
            "--structures",
            type=int,
            default=1000,
            help="maximum number of structures of either data that are embedded (default: %(default)s)",
        )
        add_overwrite_argument(parser)

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        return parse_checked(
            parser,
            arguments,
            needs=[
                ("--familiarity", "--held-out"),
                ("--held-out", "--familiarity"),
                ("--structures", "--familiarity"),
            ],
        )

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.checkpoint import import_checkpoint

        show_log()
        data = [*(options.familiarity or []), *(options.held_out or [])]
        for path in (options.out, f"{options.out}.json"):
            check_target(path, inputs=[options.checkpoint, *data], overwrite=options.overwrite)
        seen = self._seen_data(options) if options.familiarity else None
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        summary = import_checkpoint(
            options.checkpoint, options.out, options.energy_kind, options.weights, seen
        )
        record = {**header("checkpoint-import/1", options.out), **summary}
        write_json(f"{options.out}.json", record)
        print(
            f"{options.out}: {summary['source_format']} checkpoint with {summary['parameters']:,} "
            f"parameters, {' and '.join(summary['weights'])} weights, {summary['energy_kind']} energies "
            f"(from {summary['energy_kind_from']}); summary in {options.out}.json"
        )
        if seen is not None:
            counts = seen.surroundings.description
            print(
                f"familiar surroundings: of {counts['training_structures']} training structures, calibrated "
                f"on {counts['held_out_structures']} held-out structures of their elements"
            )
        return Result(record)

    def _seen_data(self, options: argparse.Namespace) -> "SeenData":
        from torch.utils.data import ConcatDataset

        from datasets_oc20 import open_dataset
        from equiformer2.checkpoint import load_checkpoint
        from equiformer2.inference import Predictor
        from equiformer2.inference.seen_data import see_data

        if options.structures < 1:
            raise InputError(f"--structures is {options.structures}: give 1 or more")
        predictor = Predictor(load_checkpoint(options.checkpoint, options.weights, options.energy_kind))
        training, held_out = (
            ConcatDataset[Any]([open_dataset(path, needs_energy=False) for path in paths])
            for paths in (options.familiarity, options.held_out)
        )
        given = {"training": options.familiarity, "held_out": options.held_out}
        return see_data(
            predictor,
            training,
            held_out,
            options.structures,
            {name: [path.name for path in paths] for name, paths in given.items()},
        )


class Demo(Command):
    """Fine-tune a network on bundled OC20 relaxations, relax adsorbates with it, prune it, write a report.

    It starts from the shipped network study_teacher and compares it with training from nothing, on systems
    that no training has seen. Needs a checkout of the project, which holds the data; it is planned
    for eight minutes on two cores.
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "--short", action="store_true", help="take a minute instead of eight; the errors mean nothing"
        )
        parser.add_argument(
            "--out", type=Path, help="new folder for everything (default: runs/demo, or the next free name)"
        )

    def run(self, options: argparse.Namespace) -> Result:
        # A checkout: that of this file, or the present folder.
        folders = Path(__file__).resolve().parents[2], Path.cwd()
        root = next((path for path in folders if (path / "data" / "oc20_trajs").is_dir()), None)
        if root is None:
            raise InputError(
                "the demo needs the data of a checkout of the project, which an installed package does not "
                "hold: clone the repository and run `equiformer2 demo` in its folder"
            )
        from equiformer2.demo.plan import DemoPlan
        from equiformer2.demo.run import run_demo

        out = options.out
        if out is None:
            names = ["demo", *(f"demo-{number}" for number in range(2, 10_000))]
            out = next(path for name in names if not (path := root / "runs" / name).exists())
        report = run_demo(root, out, DemoPlan.short() if options.short else DemoPlan())
        print(f"report: {report}")
        return Result({"report": str(report), "results": str(out / "results.json")})

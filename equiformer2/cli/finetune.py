"""Command that fine-tunes a checkpoint on own data."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    add_checkpoint_arguments,
    add_data_argument,
    add_device_argument,
    add_energy_kind_argument,
    add_overwrite_argument,
    parse_checked,
    random_seed,
)
from equiformer2.errors import InputError

_OF_NEW_ADAPTERS = ("rank", "keep", "method", "weights")
"""Options --adapter-… of which a given adapter has its own."""


class FineTune(Command):
    """Fine-tune a checkpoint on your own data, and judge it beside training from scratch.

        equiformer2 finetune --data my.lmdb --checkpoint oc20_small --out tuned

    Energies, references, normalizers, learning rate and length are chosen by what the data hold, and printed.
    Frames to judge by are held out by system. The folder gets model.pt, finetune.json with one table of
    errors before and after, and the trainings in runs. Stopped at any moment, the same command continues.
    See docs/own_data.md. With --adapter the checkpoint stays as it is, and the folder gets adapter.pt, which
    other commands take beside it (--checkpoint oc20_small --adapter tuned/adapter.pt).
    """

    def add_arguments(self, parser: Parser) -> None:
        add_data_argument(parser)
        add_checkpoint_arguments(parser)
        parser.add_argument(
            "--out", required=True, type=Path, metavar="FOLDER", help="folder for the results"
        )
        add_overwrite_argument(parser)
        data = parser.add_argument_group("data")
        data.add_argument(
            "--val",
            nargs="+",
            type=Path,
            default=[],
            metavar="FILE",
            help="frames to judge by (default: systems held out of --data)",
        )
        add_energy_kind_argument(data, "data and a checkpoint that do not declare it")
        data.add_argument(
            "--reset-head",
            action="store_true",
            help="make new normalizers, references and an energy head, for energies of another kind or "
            "method; for data without forces, leave out the force head",
        )
        data.add_argument(
            "--isolated-atoms",
            metavar="FILE",
            help="isolated atoms with total energies, taken as references (default: atoms among the frames, "
            "or a fit)",
        )
        original = parser.add_argument_group("original data of the checkpoint")
        original.add_argument(
            "--replay",
            nargs="+",
            type=Path,
            default=[],
            metavar="FILE",
            help="frames to mix into the training",
        )
        original.add_argument(
            "--replay-weight",
            nargs="+",
            type=float,
            metavar="X",
            help="frames of each --replay file per new frame (default: 1)",
        )
        original.add_argument(
            "--old",
            nargs="+",
            type=Path,
            default=[],
            metavar="FILE",
            help="frames on which forgetting is measured (default: systems held out of --replay)",
        )
        self._add_training_arguments(parser)

    @staticmethod
    def _add_training_arguments(parser: Parser) -> None:
        training = parser.add_argument_group("training")
        training.add_argument(
            "--freeze",
            metavar="N",
            help="blocks to hold, from the first one, with the embeddings; all trains the heads alone "
            "(default: nothing is held)",
        )
        training.add_argument(
            "--adapter",
            action="store_true",
            help="train low-rank maps on the held network and write adapter.pt, a small file beside the "
            "checkpoint (docs/adapters.md)",
        )
        training.add_argument(
            "--adapter-rank", type=int, default=4, help="rank of the maps (default: %(default)s)"
        )
        training.add_argument(
            "--adapter-keep",
            type=float,
            default=0.2,
            metavar="SHARE",
            help="share of the adapter that is trained and stored (default: %(default)s)",
        )
        training.add_argument(
            "--adapter-method",
            choices=("snip", "magnitude", "random", "grasp"),
            default="snip",
            help="scores by which this share is chosen before the training (default: %(default)s)",
        )
        training.add_argument(
            "--adapter-weights",
            nargs="+",
            default=["*"],
            metavar="PATTERN",
            help="names of the weights to adapt, * for anything, as in 'blocks.*.ffn.*' (default: all)",
        )
        training.add_argument(
            "--adapter-start",
            metavar="FILE",
            type=Path,
            help="adapter of the checkpoint to train on, as prune quantize --recover writes it",
        )
        training.add_argument(
            "--no-scratch", action="store_true", help="leave out the network trained from random weights"
        )
        training.add_argument(
            "--seeds", type=int, default=1, help="number of trainings and models (default: %(default)s)"
        )
        training.add_argument(
            "--seed", type=random_seed, default=0, help="first random seed (default: %(default)s)"
        )
        training.add_argument(
            "--curve",
            action="store_true",
            help="also train on 1/8, 1/4 and 1/2 of the frames, and draw the errors",
        )
        training.add_argument(
            "--max-minutes",
            type=float,
            help="time for the whole command, to which the trainings are cut (default: 18 per seed and point "
            "of the curve)",
        )
        training.add_argument("--steps", type=int, help="optimizer steps (default: by frames and time)")
        training.add_argument("--batch-size", type=int, help="frames per step (default: by their number)")
        training.add_argument(
            "--learning-rate", type=float, help="largest learning rate (default: by size of network and data)"
        )
        add_device_argument(training)
        wandb = parser.add_argument_group("Weights & Biases")
        wandb.add_argument("--wandb-project", metavar="NAME", help="project to log the fine-tuning to")
        wandb.add_argument("--wandb-entity", metavar="NAME", help="user or team of the project")
        wandb.add_argument("--wandb-offline", action="store_true", help="write W&B's files and send nothing")

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        needs = (
            ("--replay-weight", "--replay"),
            ("--wandb-entity", "--wandb-project"),
            ("--wandb-offline", "--wandb-project"),
            *((f"--adapter-{name}", "--adapter") for name in ("start", *_OF_NEW_ADAPTERS)),
        )
        conflicts = [("--adapter-start", f"--adapter-{name}") for name in _OF_NEW_ADAPTERS]
        return parse_checked(parser, arguments, needs, [("--adapter", "--freeze"), *conflicts])

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.adapters import AdapterSettings
        from equiformer2.checkpoint.adapter_files import read_adapter
        from equiformer2.finetuning.folder import FineTuneSettings
        from equiformer2.finetuning.run import fine_tune
        from equiformer2.training.wandb_logging import WandbSettings

        def names(paths: Sequence[Path]) -> tuple[str, ...]:
            return tuple(str(path) for path in paths)

        adapter = None
        if options.adapter:
            if options.adapter_rank < 1:
                raise InputError(f"--adapter-rank is {options.adapter_rank}: give at least 1")
            start = None if options.adapter_start is None else read_adapter(options.adapter_start)
            adapter = AdapterSettings(
                rank=options.adapter_rank if start is None else max(1, start.rank),
                keep=options.adapter_keep if start is None else start.kept_share,
                method=options.adapter_method,
                weights=tuple(options.adapter_weights),
                start=None if start is None else str(options.adapter_start),
            )
        settings = FineTuneSettings(
            data=names(options.data),
            checkpoint=options.checkpoint,
            out=options.out,
            val=names(options.val),
            weights=options.weights,
            energy_kind=options.energy_kind,
            reset_head=options.reset_head,
            isolated_atoms=options.isolated_atoms,
            freeze=options.freeze,
            replay=names(options.replay),
            replay_weights=tuple(options.replay_weight or (1.0,)),
            old=names(options.old),
            scratch=not options.no_scratch,
            seeds=options.seeds,
            seed=options.seed,
            curve=options.curve,
            max_minutes=options.max_minutes,
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            device=options.device,
            adapter=adapter,
            overwrite=options.overwrite,
            wandb=WandbSettings(options.wandb_project, options.wandb_entity, options.wandb_offline),
        )
        return Result(fine_tune(settings))

"""Commands that make a network of experts smaller for a task, and that read what a structure needs of it."""

import argparse
from pathlib import Path
from typing import Any

from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import add_overwrite_argument, random_seed
from equiformer2.files import check_target, write_json
from equiformer2.script import header


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="file of a network of experts")
    parser.add_argument(
        "--weights",
        choices=("raw", "averaged"),
        help="weights of the file (default: averaged where the file has them)",
    )
    parser.add_argument(
        "--top",
        type=int,
        metavar="K",
        help="number of leading experts of a structure that count in TCESS (default: a quarter of all)",
    )


class Prune(Command):
    """Keep the experts that a task needs, in a smaller file.

        equiformer2 experts prune --checkpoint joint.safetensors --task teacher --out half.safetensors

    Experts with the highest TCESS stay: the mean coefficient over structures of the task, where it is among
    the largest of the structure. The bound of the change of the weights is printed first, then the change
    that is measured on structures: those of --data, or the few of the training data that the file holds.
    The result knows this task alone and is used like the whole file. A summary is written beside it as JSON.
    """

    def add_arguments(self, parser: Parser) -> None:
        _add_arguments(parser)
        parser.add_argument("--task", required=True, metavar="NAME", help="task that the result is for")
        parser.add_argument(
            "--keep",
            type=float,
            default=0.5,
            metavar="SHARE",
            help="share of the experts that stays (default: %(default)s)",
        )
        parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
        parser.add_argument(
            "--data",
            nargs="+",
            metavar="FILE",
            help="structures of the task, with or without labels: LMDB files, OC20's extended XYZ, other "
            "files that ASE reads, or folders of those (default: those that the checkpoint holds)",
        )
        parser.add_argument(
            "--structures",
            type=int,
            default=64,
            help="maximum number of structures of --data (default: %(default)s)",
        )
        parser.add_argument(
            "--method",
            choices=("tcess", "frequency", "reap", "random"),
            default="tcess",
            help="scores of the experts; the others are there to compare with (default: %(default)s)",
        )
        parser.add_argument(
            "--seed",
            type=random_seed,
            default=0,
            help="random seed of the choice of structures, and of --method random",
        )
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.checkpoint.expert_files import read_experts, write_experts
        from equiformer2.experts.prune import (
            PruneSettings,
            foreign_structures,
            measure,
            prune_experts,
        )
        from equiformer2.pruning.calibration_data import read_structures

        data, summary_file = options.data or [], Path(f"{options.out}.json")
        for target in (options.out, summary_file):
            check_target(target, False, [options.checkpoint, *data], options.overwrite)
        settings = PruneSettings(options.keep, options.method, options.top, options.seed)
        contents = read_experts(options.checkpoint)
        given = read_structures(data, options.structures, options.seed) if data else []
        pruned, record = prune_experts(contents, options.task, settings, given, options.weights)
        print(self._chosen(record))
        record |= measure(contents, pruned, options.task, given, options.weights, progress=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_experts(options.out, pruned)
        flagged = foreign_structures(pruned, options.task, given, options.weights)
        sizes = [Path(file).stat().st_size for file in (options.checkpoint, options.out)]
        record = {
            **header("experts-prune/1", options.checkpoint),
            **record,
            "flagged": flagged,
            "bytes": sizes[1],
            "bytes_before": sizes[0],
        }
        write_json(summary_file, record)
        print(self._measured(record))
        for each in flagged:
            print(f"{each['sid']}/{each['fid']} (sid/fid): {each['text']}")
        share = sizes[1] / sizes[0]
        print(f"{options.out}: {sizes[1]:,} bytes, {share:.1%} of {sizes[0]:,}; summary in {summary_file}")
        return Result(record)

    @staticmethod
    def _chosen(record: dict[str, Any]) -> str:
        """Lines about the experts that stay and the bound."""
        kept = ", ".join(map(str, record["kept"]))
        return (
            f"experts {kept} of {record['num_experts']} stay for {record['task']} ({record['method']}), with "
            f"at least {record['kept_share']:.1%} of the coefficients ({record['systems']} structures)\n"
            f"bound of the change of the weights: {record['bound_relative']:.1%} of their norm "
            f"({record['bound']:.4g}); the change is {record['weight_change_relative']:.1%}"
        )

    @staticmethod
    def _measured(record: dict[str, Any]) -> str:
        """Sentence about the measured change."""
        change = record["measured_change_eV_A"]
        if record["measured_change_eV"] is None:
            return "no structures to measure the change on: the checkpoint holds none, so give --data"
        energy = f"energies {record['measured_change_eV']:.4f} eV"
        forces = "" if change is None else f"forces of free atoms {change:.4f} eV/Å, "
        text = f"measured change on {record['systems']} structures (mean absolute): {forces}{energy}"
        if record["force_mae_ratio"] is not None:
            text += f"; force MAE {record['force_mae_eV_A']:.4f} eV/Å ({record['force_mae_ratio'] - 1:+.2%})"
        return text


class Retrieve(Command):
    """Find the experts that a structure needs, and read these alone.

        equiformer2 experts retrieve --checkpoint joint.safetensors --structure slab.traj --json
        equiformer2 experts retrieve --checkpoint joint.safetensors --structure slab.traj --tasks 'dft*'
            --out slab.pt

    Of every task, or every composition of its training structures that the file holds, the file has a set of
    the experts that matter most. The gate's answers to the structure's composition are compared with theirs,
    and the nearest set is read from the file and merged. Labels are no property of a structure: name the
    tasks with the kind that is wanted by --tasks.
    """

    def add_arguments(self, parser: Parser) -> None:
        _add_arguments(parser)
        parser.add_argument(
            "--structure", required=True, metavar="FILE", help="structure file that ASE reads"
        )
        parser.add_argument(
            "--index", type=int, default=-1, help="number of the frame in the file (default: the last one)"
        )
        parser.add_argument(
            "--tasks",
            nargs="+",
            metavar="NAME",
            help="tasks to choose from, also patterns such as 'dft*' (default: all)",
        )
        parser.add_argument(
            "--keep",
            type=float,
            metavar="SHARE",
            help="share of the experts in a set (default: 0.5; all those of a pruned file)",
        )
        parser.add_argument(
            "--per",
            choices=("task", "composition"),
            default="task",
            help="have one set per task, or one per composition of every task (default: %(default)s)",
        )
        parser.add_argument(
            "--out", type=Path, metavar="FILE", help="ordinary checkpoint to write of the merged experts"
        )
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.structure_files import read_structure
        from equiformer2.experts.retrieve import ExpertStore
        from equiformer2.inference.atoms import atoms_to_data

        given = [options.checkpoint, options.structure]
        if options.out is not None:
            check_target(options.out, False, given, options.overwrite)
        store = ExpertStore(options.checkpoint, options.keep, options.per, options.top, options.weights)
        atoms = read_structure(options.structure, options.index)
        structure = atoms_to_data(atoms, max_num_elements=store.config.max_num_elements)
        found = store.find(structure, options.tasks)
        network = store.network(found)
        size = Path(options.checkpoint).stat().st_size
        record = {
            **store.describe(found),
            "bytes_read": store.bytes_read,
            "bytes": size,
            "parameter_bytes": sum(p.numel() * p.element_size() for p in network.parameters()),
        }
        experts = ", ".join(map(str, found.experts))
        told = (
            f"task {found.task}, {record['energy_kind']} energies (distance {found.match.distance:.3g})",
            f"experts {experts} of {store.num_experts} with {found.kept_share:.1%} of the coefficients",
            f"{store.bytes_read:,} of {size:,} bytes read",
        )
        print(f"{options.structure}: {'; '.join(told)}")
        for text in found.warnings():
            print(f"warning: {text}")
        if options.out is not None:
            store.write(found, options.out)
            record["out"] = str(options.out)
            print(f"wrote {options.out}: an ordinary checkpoint for this composition")
        return Result(record, checkpoint=options.checkpoint)

"""Commands around networks of experts."""

import argparse
from pathlib import Path

from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import add_overwrite_argument
from equiformer2.files import check_target, write_json
from equiformer2.script import header


class Merge(Command):
    """Write an ordinary checkpoint of one task of a network of experts.

        equiformer2 experts merge --checkpoint best_experts.safetensors --task dft --out dft.pt
        equiformer2 experts merge --checkpoint best_experts.safetensors --task dft --composition Cu36CO
            --out on_copper.pt

    The experts are added up with the coefficients that the network gives to the task and to one composition:
    the given one, or the mean composition of the task's training structures. For structures of this
    composition the checkpoint answers as the network of experts; for others that would have used other
    coefficients. It costs no more at inference than a network without experts. A summary is written beside it
    as JSON.
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "--checkpoint", required=True, type=Path, metavar="FILE", help="file of a network of experts"
        )
        parser.add_argument("--task", required=True, help="name of the task (data set) to merge for")
        parser.add_argument(
            "--composition",
            metavar="FORMULA",
            help="formula of the structures to be computed, slab and adsorbate together, such as Cu36CO, "
            "of which the shares of the elements count (default: mean of the task's training structures)",
        )
        parser.add_argument(
            "--weights",
            choices=("raw", "averaged"),
            help="weights to use (default: the averaged ones, where the file has them)",
        )
        parser.add_argument(
            "--out", required=True, type=Path, metavar="FILE", help="native checkpoint to write"
        )
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.experts.merge import merge_experts

        summary_file = Path(f"{options.out}.json")
        for target in (options.out, summary_file):
            check_target(target, False, [options.checkpoint], options.overwrite)
        summary = merge_experts(
            options.checkpoint, options.task, options.out, options.composition, options.weights
        )
        record = {**header("experts-merge/1", options.checkpoint), **summary}
        write_json(summary_file, record)
        shares = list(summary["composition"].items())[:6]
        elements = ", ".join(f"{name} {share:.3g}" for name, share in shares)
        print(
            f"{options.out}: task {options.task} of {options.checkpoint} for the composition {elements} "
            f"({summary['composition_from']}), {summary['parameters']:,} parameters, "
            f"{summary['energy_kind']} energies; summary in {summary_file}"
        )
        if summary["unseen_elements"]:
            names = ", ".join(summary["unseen_elements"])
            print(f"warning: {names} not among the training data of {options.task}")
        if summary.get("excess_of_bound") is not None:
            print(
                f"for this composition the weights may have changed by {summary['excess_of_bound']:.4g} when "
                "the file was pruned, more than for any structure of the task that it was pruned with"
            )
        return Result(record)

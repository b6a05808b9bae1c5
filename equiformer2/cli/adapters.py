"""Commands around adapter files."""

import argparse
from pathlib import Path

from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import add_overwrite_argument, checkpoint_file
from equiformer2.files import check_target, write_json
from equiformer2.script import header


class Merge(Command):
    """Write an ordinary checkpoint that answers as a network with its adapter.

        equiformer2 adapters merge --checkpoint oc20_small --adapter tuned/adapter.pt --out tuned.pt

    The file costs no more at inference than the network alone. Several adapters that were trained alike, such
    as those of several seeds, give the mean of their networks. A summary is written beside it as JSON.
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "--checkpoint",
            required=True,
            type=checkpoint_file,
            metavar="FILE|NAME",
            help="checkpoint file that the adapter belongs to, or the name of a shipped model",
        )
        parser.add_argument(
            "--adapter", required=True, nargs="+", metavar="FILE", help="adapter file, or several of them"
        )
        parser.add_argument(
            "--out", required=True, type=Path, metavar="FILE", help="native checkpoint to write"
        )
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.checkpoint.adapted import merge_adapters

        summary_file = Path(f"{options.out}.json")
        for target in (options.out, summary_file):
            check_target(target, False, [options.checkpoint, *options.adapter], options.overwrite)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        summary = merge_adapters(options.checkpoint, options.adapter, options.out)
        record = {**header("adapters-merge/1", options.checkpoint), **summary}
        write_json(summary_file, record)
        count = len(options.adapter)
        merged = "its adapter" if count == 1 else f"the mean of {count} adapters"
        print(
            f"{options.out}: {options.checkpoint} with {merged} merged, {summary['parameters']:,} "
            f"parameters, {summary['energy_kind']} energies; summary in {summary_file}"
        )
        return Result(record)


class Inspect(Command):
    """Describe an adapter file: its network, rank, kept share and kind of energy.

    equiformer2 adapters inspect tuned/adapter.pt --json
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("adapter", metavar="FILE", help="adapter file")

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.checkpoint.adapter_files import read_adapter
        from equiformer2.checkpoint.tensor_files import plain, sha256

        adapter = read_adapter(options.adapter)
        whole = ", ".join(sorted(adapter.replaced)) or "nothing"
        record = {
            **header("adapters-inspect/1"),
            "checkpoint_sha256": adapter.base.sha256,
            "file": options.adapter,
            "sha256": sha256(options.adapter),
            "bytes": Path(options.adapter).stat().st_size,
            **adapter.describe(),
            "normalizers": plain(adapter.normalizers.to_dict()),
            "provenance": {name: value for name, value in adapter.provenance.items() if name != "config"},
        }
        print(
            f"{options.adapter}: adapter of {adapter.base.file} ({adapter.base.weights} weights, fingerprint "
            f"{adapter.base.fingerprint})\n"
            f"rank {adapter.rank} on {len(adapter.maps)} weights, {adapter.kept_share:.1%} of the entries "
            f"kept, {adapter.trainable_parameters:,} trained numbers, {record['bytes']:,} bytes\n"
            f"{adapter.energy_kind} energies; stored whole: {whole}"
        )
        return Result(record)

"""Convert LMDB files (OC20's or ours) to ASE-LMDB, or ASE-LMDB files to ours, without loss."""

import argparse
import logging
from pathlib import Path

from datasets_oc20.convert import WRITERS, convert, shard_targets
from datasets_oc20.reader import OC20Lmdb
from equiformer2.files import check_target
from equiformer2.script import add_overwrite_argument, run_script, show_log


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="file, or folder of shards")
    parser.add_argument("--out", required=True, type=Path, help="file, or folder when --data is one")
    parser.add_argument("--to", required=True, choices=sorted(WRITERS))
    parser.add_argument(
        "--energy-kind", choices=("adsorption", "total"), help="for data that does not declare it"
    )
    parser.add_argument("--num-workers", type=int, help="processes, one shard each (default: one per core)")
    add_overwrite_argument(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    show_log()
    logging.getLogger("datasets_oc20").setLevel(logging.INFO)
    if arguments.data.is_dir():
        check_target(arguments.out, is_folder=True)
        targets = shard_targets(OC20Lmdb(arguments.data).shards, arguments.out, arguments.to)
        finished = all(path.exists() for path in targets)  # else a stopped call goes on
        for path in targets:
            check_target(path, inputs=[arguments.data], overwrite=arguments.overwrite or not finished)
    else:
        check_target(arguments.out, inputs=[arguments.data], overwrite=arguments.overwrite)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    count = convert(
        arguments.data,
        arguments.out,
        arguments.to,
        arguments.energy_kind,
        arguments.num_workers,
        arguments.overwrite,
    )
    print(f"{count} records in {arguments.out}")


if __name__ == "__main__":
    run_script(main)

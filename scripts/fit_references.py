"""Fit per-element reference energies to a dataset of total energies (least squares), for training on them."""

import argparse
from pathlib import Path

from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.reference_fit import fit_references, to_text, write_references
from equiformer2.files import check_target, write_json
from equiformer2.script import add_overwrite_argument, run_script


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", required=True, type=Path, nargs="+", help="LMDB or ASE-LMDB files, or folders of them"
    )
    parser.add_argument("--out", required=True, type=Path, help=".npz file; a .json with the table beside it")
    parser.add_argument(
        "--energy-kind", choices=("adsorption", "total"), help="for data that does not say it"
    )
    parser.add_argument("--num-workers", type=int, help="processes (default: one per core)")
    add_overwrite_argument(parser)
    arguments = parser.parse_args()
    if arguments.out.suffix != ".npz":
        parser.error(f"--out {arguments.out}: give a name that ends with .npz")
    return arguments


def main() -> None:
    arguments = parse()
    for path in (arguments.out, arguments.out.with_suffix(".json")):
        check_target(path, inputs=arguments.data, overwrite=arguments.overwrite)
    dataset = OC20Lmdb(arguments.data, arguments.energy_kind)
    fit = fit_references(dataset, arguments.num_workers, progress=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out.with_suffix(".json"), fit.to_record())
    write_references(fit, arguments.out)
    print(to_text(fit, str(arguments.out)))


if __name__ == "__main__":
    run_script(main)

"""Write raw OC20 files (*.extxyz[.xz] with their reference energies) to LMDB files for training."""

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets_oc20.errors import DataError
from datasets_oc20.extxyz import read_text
from datasets_oc20.preprocess import PreprocessOptions, preprocess
from datasets_oc20.shards import preprocess_shards
from equiformer2.files import check_target, write_json
from equiformer2.script import add_overwrite_argument, parse_checked, run_script, show_log


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder of the raw release")
    parser.add_argument("--out", required=True, type=Path, help="LMDB file to write, or folder for --shards")
    parser.add_argument(
        "--shards", type=int, help="write so many LMDB files, one process each; a stopped run goes on"
    )
    parser.add_argument("--energy", choices=("adsorption", "total"), default="adsorption")
    parser.add_argument("--num-workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--max-energy", type=float, default=10.0, help="largest |adsorption energy| kept, eV (default 10)"
    )
    parser.add_argument(
        "--max-force", type=float, default=50.0, help="largest force on a free atom kept, eV/Å (default 50)"
    )
    parser.add_argument(
        "--min-force", type=float, help="smallest largest force on a free atom of a frame that is kept, eV/Å"
    )
    parser.add_argument("--no-filter", action="store_true", help="keep frames of any energy and force")
    parser.add_argument("--systems", help="only these systems, separated by commas")
    parser.add_argument("--systems-file", type=Path, help="only the systems in this file, one a line")
    parser.add_argument("--exclude", help="all but these systems, separated by commas")
    parser.add_argument(
        "--frames", type=int, help="most frames per system: half spread evenly, half with the largest forces"
    )
    parser.add_argument("--later-out", type=Path, help="second LMDB for the last frames of every system")
    parser.add_argument(
        "--later-fraction", type=float, default=0.2, help="part of a relaxation for --later-out (default 0.2)"
    )
    parser.add_argument(
        "--later-gap", type=float, default=0.1, help="part before it that goes to neither file (default 0.1)"
    )
    parser.add_argument(
        "--later-tail", type=float, default=0.0, help="part behind it that is for training again (default 0)"
    )
    parser.add_argument(
        "--later-frames", type=int, help="most frames per system in --later-out, spread evenly"
    )
    add_overwrite_argument(parser)
    later = ("--later-fraction", "--later-gap", "--later-tail", "--later-frames")
    return parse_checked(
        parser,
        needs=[(option, "--later-out") for option in later],
        excludes=[
            ("--max-energy", "--no-filter"),
            ("--max-force", "--no-filter"),
            ("--max-energy", "--energy=total"),
            ("--overwrite", "--shards"),
        ],
    )


def chosen_systems(arguments: argparse.Namespace) -> list[str] | None:
    """The systems of `--systems` and `--systems-file`, or None for all."""
    if arguments.systems is not None and arguments.systems_file is not None:
        raise DataError("give --systems or --systems-file, not both.")
    if arguments.systems_file is not None:
        chosen = [line.strip() for line in read_text(arguments.systems_file).splitlines() if line.strip()]
    elif arguments.systems is not None:
        chosen = names(arguments.systems)
    else:
        return None
    if not chosen:
        raise DataError("--systems and --systems-file must name a system; leave them away for all.")
    return chosen


def names(text: str | None) -> list[str]:
    """The names in a list separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse names under which a result would replace another one, an input, or what is there."""
    if arguments.shards is not None:  # a stopped run goes on; its folder says of what
        check_target(arguments.out, is_folder=True)
        return
    report = arguments.out.with_suffix(".json")
    for path in (arguments.out, arguments.later_out):
        if path is not None and path.resolve() == report.resolve():
            raise DataError(f"{path}: is the name of the report on --out; name the LMDB file *.lmdb.")
    inputs = [path for path in (arguments.data, arguments.systems_file) if path is not None]
    for path in (arguments.out, arguments.later_out, report):
        if path is not None:
            check_target(path, inputs=inputs, overwrite=arguments.overwrite)


def main() -> None:
    arguments = parse()
    options = PreprocessOptions(
        energy_kind=arguments.energy,
        max_energy=None if arguments.no_filter else arguments.max_energy,
        max_force=None if arguments.no_filter else arguments.max_force,
        min_force=arguments.min_force,
        frames=arguments.frames,
        later_fraction=arguments.later_fraction if arguments.later_out else 0.0,
        later_gap=arguments.later_gap,
        later_tail=arguments.later_tail,
        later_frames=arguments.later_frames,
    )
    show_log()
    logging.getLogger("datasets_oc20").setLevel(logging.INFO)
    _check_outputs(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    choice: dict[str, Any] = {
        "options": options,
        "systems": chosen_systems(arguments),
        "exclude": names(arguments.exclude),
        "num_workers": arguments.num_workers,
    }
    if arguments.shards is None:
        report = preprocess(arguments.data, arguments.out, later_out=arguments.later_out, **choice)
        write_json(arguments.out.with_suffix(".json"), asdict(report))
    else:
        report = preprocess_shards(arguments.data, arguments.out, arguments.shards, **choice)
        write_json(arguments.out / "report.json", asdict(report))
    later = f", {report.written_later} later frames to {arguments.later_out}" if arguments.later_out else ""
    print(f"{report.written} of {report.read} frames of {report.files} files to {arguments.out}{later}")
    print(
        f"removed: {report.removed_energy} by energy, {report.removed_force} by force, "
        f"{report.removed_rest} nearly at rest; "
        f"{report.not_chosen} not chosen"
    )


if __name__ == "__main__":
    run_script(main)

"""Show what is in a dataset: frames, systems, elements, energies, tags, and the frames that look wrong."""

import argparse
from pathlib import Path

from datasets_oc20.inspection import inspect_dataset
from datasets_oc20.inspection_figure import draw_inspection
from datasets_oc20.inspection_report import to_record, to_text
from datasets_oc20.reader import OC20Lmdb
from equiformer2.files import check_target, write_json
from equiformer2.script import add_overwrite_argument, run_script


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", required=True, type=Path, nargs="+", help="LMDB or ASE-LMDB files, or folders of them"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for inspection.json and .png")
    parser.add_argument(
        "--energy-kind", choices=("adsorption", "total"), help="for data that does not declare it"
    )
    parser.add_argument(
        "--max-frames",
        type=int,
        default=50_000,
        help="inspect so many, evenly spread (default 50000; 0: all)",
    )
    parser.add_argument("--num-workers", type=int, help="processes (default: one per core)")
    add_overwrite_argument(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    check_target(arguments.out, is_folder=True)
    for name in ("inspection.json", "inspection.png"):
        check_target(arguments.out / name, inputs=arguments.data, overwrite=arguments.overwrite)
    dataset = OC20Lmdb(arguments.data, arguments.energy_kind)
    found = inspect_dataset(dataset, arguments.max_frames or None, arguments.num_workers)
    record = to_record(found, dataset)
    print(to_text(record))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "inspection.json", record)
    draw_inspection(found, ", ".join(path.name for path in arguments.data), arguments.out / "inspection.png")
    print(f"figure: {arguments.out / 'inspection.png'}")


if __name__ == "__main__":
    run_script(main)

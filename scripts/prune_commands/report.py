"""Where a network spends its time and what it could do without, before anything is cut.

Per block and tag: how much the block changes the features of the atoms (cosine) and how sharply it attends
(entropy). Per head and channel: importance. Per part: operations and measured time. And what inference leaves
out already because nobody reads it. Tables are printed and written with a figure to --out.
"""

import argparse
from pathlib import Path

from equiformer2.script import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, nargs="+", help="LMDB files, folders of shards or extended XYZ files"
    )
    parser.add_argument("--out", default="runs/pruning_report", help="output folder (default: %(default)s)")
    parser.add_argument(
        "--structures", type=int, default=32, help="most structures, of many systems (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="structures at once (default: %(default)s)")
    parser.add_argument(
        "--objective",
        choices=("probe", "labels"),
        default="probe",
        help="importance by the outputs along random directions, or by the loss (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed passes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of structures and directions")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in --out")


def run(options: argparse.Namespace) -> None:
    from equiformer2.checkpoint import load_checkpoint
    from equiformer2.errors import InputError
    from equiformer2.files import check_target
    from equiformer2.inference import Predictor
    from equiformer2.inference.record import claim_folder
    from equiformer2.pruning.analysis.redundancy_report import RECORD, make_report, write
    from equiformer2.pruning.analysis.report_tables import show
    from equiformer2.pruning.calibration_data import labelled_energies, read_structures

    check_target(Path(options.out) / RECORD, inputs=[options.checkpoint, *options.data])
    folder = claim_folder(options.out, RECORD, options.overwrite)
    checkpoint = load_checkpoint(options.checkpoint, options.weights, options.energy_kind)
    predictor = Predictor(checkpoint, options.device, precision=options.precision, backend=options.backend)
    kind = checkpoint.energy_kind
    if options.objective == "labels" and not labelled_energies(options.data, kind, options.energy_kind):
        raise InputError(
            f"not all of the data are labelled with {kind} energies: use --objective probe, "
            "or name the kind of energy of data that do not say it with --energy-kind"
        )
    structures = read_structures(options.data, options.structures, options.seed)
    report = make_report(
        predictor,
        structures,
        batch_size=options.batch_size,
        objective=options.objective,
        repeats=options.repeats,
        seed=options.seed,
        source={"checkpoint": options.checkpoint, "data": options.data},
    )
    show(report)
    for path in write(report, folder):
        print(f"wrote {path}")

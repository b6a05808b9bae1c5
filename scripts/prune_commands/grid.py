"""Find the smallest S2 grids that keep a network's answers within a tolerance, and write it with them.

Not lossless: the table says how far forces and energies drift, and how well they turn with the structure.
Evaluate the new checkpoint before you use it.
"""

import argparse
from pathlib import Path

from equiformer2.script import add_model_arguments, add_overwrite_argument, origin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, nargs="+", help="LMDB files, folders of shards or extended XYZ files"
    )
    parser.add_argument("--out", required=True, type=Path, help="checkpoint to write; FILE.json beside it")
    parser.add_argument(
        "--tol", type=float, default=1e-3, help="largest relative deviation (default: %(default)s)"
    )
    parser.add_argument(
        "--measure",
        choices=("drift", "rotation"),
        default="drift",
        help="against the network as it is, or against a rotation of the structure (default: %(default)s)",
    )
    parser.add_argument("--structures", type=int, default=8, help="most structures (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="structures at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of structures and rotations")
    add_overwrite_argument(parser)


def run(options: argparse.Namespace) -> None:
    from equiformer2.checkpoint import load_checkpoint
    from equiformer2.files import check_target, write_json
    from equiformer2.inference import Predictor
    from equiformer2.inference.predictor import matmul_precision
    from equiformer2.pruning.calibration_data import read_structures
    from equiformer2.pruning.structured.grid_tuning import GridRow, tune_grid, write_with_grids

    record = options.out.with_suffix(".json")
    for path in (options.out, record):
        check_target(path, inputs=[options.checkpoint, *options.data], overwrite=options.overwrite)
    checkpoint = load_checkpoint(options.checkpoint, options.weights, options.energy_kind)
    predictor = Predictor(checkpoint, options.device, precision=options.precision, backend=options.backend)
    structures = read_structures(options.data, options.structures, options.seed)
    print(f"{'attention':>11} {'feed-forward':>13} {'drift':>9} {'rotated':>9} {'operations':>11}")

    def show(row: GridRow) -> None:
        attn, ffn = (f"{a} x {b}" for a, b in (row.resolution.attn, row.resolution.ffn))
        print(f"{attn:>11} {ffn:>13} {row.drift:9.1e} {row.rotation:9.1e} {row.macs:11.3f}", flush=True)

    with matmul_precision(options.precision, predictor.device):
        choice = tune_grid(
            predictor.model,
            structures,
            options.tol,
            measure=options.measure,
            batch_size=options.batch_size,
            seed=options.seed,
            progress=show,
        )
    print("chosen:")
    show(choice.rows[-1])
    write_with_grids(options.checkpoint, options.energy_kind, choice, options.out)
    write_json(
        record, {**origin(), "checkpoint": options.checkpoint, "data": options.data, **choice.to_dict()}
    )
    print(f"wrote {options.out} and {record}")

"""Predict energies, and forces where the model has them, of a dataset and write them as .npz or .json."""

import argparse
from pathlib import Path

from equiformer2.script import add_model_arguments, run_script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, help="LMDB file or folder of shards")
    parser.add_argument("--out", required=True, type=Path, help="file to write, .npz or .json")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_atoms", type=int, help="most atoms in a batch")
    parser.add_argument("--num_workers", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from datasets_oc20 import OC20Lmdb
    from equiformer2.checkpoint import load_checkpoint
    from equiformer2.inference import Predictor
    from equiformer2.training.prediction import check_output, predict_dataset, write_predictions

    check_output(arguments.out)
    checkpoint = load_checkpoint(arguments.checkpoint, arguments.weights, arguments.energy_kind)
    predictor = Predictor(
        checkpoint, arguments.device, precision=arguments.precision, backend=arguments.backend
    )
    arrays = predict_dataset(
        predictor.predict,
        OC20Lmdb(arguments.data),
        arguments.batch_size,
        arguments.max_atoms,
        arguments.num_workers,
    )
    write_predictions(arguments.out, arrays)
    forces = "forces in eV/Å" if "forces" in arrays else "no forces, which the model does not predict"
    print(
        f"{arguments.out}: {len(arrays['energy'])} structures, {checkpoint.energy_kind} energies in eV, "
        f"{forces}, {checkpoint.weights} weights"
    )


if __name__ == "__main__":
    run_script(main)

"""Evaluate a checkpoint: OC20's S2EF metrics beside trivial baselines."""

import argparse
from pathlib import Path

from equiformer2.script import add_model_arguments, run_script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, nargs="+", help="LMDB files or folders of shards")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    parser.add_argument("--figures", type=Path, help="folder for parity figures")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_atoms", type=int, help="most atoms in a batch")
    parser.add_argument("--num_workers", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from equiformer2.checkpoint import load_checkpoint
    from equiformer2.files import check_target
    from equiformer2.inference import Predictor
    from equiformer2.training import evaluation

    if arguments.out is not None:
        check_target(arguments.out)
    if arguments.figures is not None:
        check_target(arguments.figures, is_folder=True)
    checkpoint = load_checkpoint(arguments.checkpoint, arguments.weights, arguments.energy_kind)
    predictor = Predictor(
        checkpoint, arguments.device, precision=arguments.precision, backend=arguments.backend
    )
    datasets = {
        path: evaluation.open_dataset(path, predictor, arguments.energy_kind) for path in arguments.data
    }
    print(f"{arguments.checkpoint}: {checkpoint.weights} weights, {checkpoint.energy_kind} energies")
    results = {}
    for path, dataset in datasets.items():
        results[path] = evaluation.evaluate(
            predictor, dataset, arguments.batch_size, arguments.max_atoms, arguments.num_workers
        )
        print(f"{path}: {results[path].structures} structures of {results[path].systems} systems")
        print(evaluation.table(results[path]))
    if len(results) > 1:
        mean = evaluation.average(list(results.values()))["metrics"]
        print("average: " + ", ".join(f"{name} {value:.4f}" for name, value in mean.items()))
    if arguments.out is not None:
        evaluation.write_report(arguments.out, predictor, results)
        print(f"numbers: {arguments.out}")
    if arguments.figures is not None:
        evaluation.draw_figures(arguments.figures, results)
        print(f"figures: {arguments.figures}")


if __name__ == "__main__":
    run_script(main)

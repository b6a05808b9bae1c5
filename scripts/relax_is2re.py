"""Relax the systems of IS2RE data with a checkpoint and compare with DFT (IS2RE and IS2RS).

    python scripts/relax_is2re.py --checkpoint best.pt --data-root is2re/all --splits val_id val_ood_ads \
        --energy-kind adsorption --device cuda --out runs/is2re

Each dataset has a folder in --out with one trajectory per system. The same command goes on after a stop;
a finished folder is read again, or extended by other splits, with --overwrite.
Structures that cannot be relaxed are skipped and named.
"""

import argparse
from pathlib import Path

from equiformer2.script import (
    add_model_arguments,
    add_router_argument,
    parse_checked,
    run_script,
    show_log,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_arguments(parser)
    add_router_argument(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", help="LMDB file or folder of shards, one structure per system")
    data.add_argument("--data-root", type=Path, help="folder that holds a folder or file for each split")
    parser.add_argument("--splits", nargs="+", help="names in --data-root (default: the validation splits)")
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write the report of a finished --out again; relaxations that are there are kept",
    )
    parser.add_argument("--fmax", type=float, default=0.02, help="eV/Å (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="most steps (default: %(default)s)")
    parser.add_argument(
        "--max-step", type=float, default=0.04, help="largest move of an atom, Å (default: %(default)s)"
    )
    parser.add_argument("--memory", type=int, default=50, help="steps LBFGS remembers (default: %(default)s)")
    parser.add_argument("--frames", choices=("all", "ends"), default="all", help="what trajectories keep")
    parser.add_argument("--batch-size", type=int, default=32, help="most systems at once")
    parser.add_argument(
        "--max-atoms", type=int, help="most atoms at once; a structure of more is relaxed alone"
    )
    parser.add_argument(
        "--require-convergence",
        action="store_true",
        help="exit with status 3 unless every system was relaxed and has converged",
    )
    return parse_checked(parser, needs=[("--splits", "--data-root")])


def main() -> int:
    arguments = parse_arguments()
    from datasets_oc20.catalogue import VALIDATION_SPLITS, find_splits
    from equiformer2.files import check_target, write_json
    from equiformer2.inference import Predictor
    from equiformer2.inference.batched import RelaxationSettings
    from equiformer2.pruning.routing.router_files import for_batched_relaxation
    from equiformer2.training.relaxation_run import (
        REPORT,
        average_over,
        coverage,
        metric_lines,
        open_starts,
        relax_dataset,
        relaxation_table,
    )

    check_target(arguments.out, is_folder=True)
    given = [arguments.checkpoint, arguments.data or arguments.data_root]
    given += [] if arguments.router is None else [arguments.router]
    check_target(arguments.out / REPORT, inputs=given, overwrite=arguments.overwrite)
    settings = RelaxationSettings(
        arguments.fmax, arguments.steps, arguments.max_step, arguments.memory, frames=arguments.frames
    )
    if arguments.data_root is None:
        paths = {Path(arguments.data).resolve().stem: Path(arguments.data)}
    else:
        paths = find_splits(arguments.data_root, arguments.splits or VALIDATION_SPLITS)
    predictor = Predictor(
        arguments.checkpoint,
        arguments.device,
        arguments.weights,
        arguments.energy_kind,
        arguments.precision,
        arguments.backend,
        for_batched_relaxation(arguments.router),
    )
    show_log()
    datasets = {name: open_starts(path, predictor, arguments.energy_kind) for name, path in paths.items()}
    reports = {}
    for name, dataset in datasets.items():
        folder = arguments.out / name
        reports[name] = relax_dataset(
            predictor,
            Path(arguments.checkpoint),
            dataset,
            folder,
            settings,
            arguments.batch_size,
            arguments.max_atoms,
            arguments.router,
        )
        print(f"{name}: {folder}")
        print(relaxation_table(reports[name]))
    average = average_over(reports)
    if len(reports) > 1:
        print("\n".join([f"average of {len(reports)}", *metric_lines(average)]))
        if any(report["skipped"] for report in reports.values()):
            print(f"  All of this is of {coverage(reports.values())}: the others were skipped")
    keys = ("structures", "relaxed", "converged")
    counts = {key: sum(report[key] for report in reports.values()) for key in keys}
    write_json(arguments.out / REPORT, {"datasets": reports, **counts, "average": average})
    if counts["converged"] == counts["structures"]:
        return 0
    print(f"NOT converged: {counts['structures'] - counts['converged']} of {counts['structures']} structures")
    return 3 if arguments.require_convergence else 0


if __name__ == "__main__":
    run_script(main)

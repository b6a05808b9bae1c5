"""Evaluate a checkpoint: OC20's S2EF metrics per dataset and their average, beside trivial baselines.

    python scripts/evaluate.py --checkpoint best.pt --data-root oc20 --out results.json --figures figures

evaluates on oc20/val_id, oc20/val_ood_ads, oc20/val_ood_cat and oc20/val_ood_both. With --out, finished
datasets are kept beside it, and the same command goes on after a stop; once all are finished, --overwrite
writes the numbers again.
"""

import argparse
from pathlib import Path

from equiformer2.script import (
    add_model_arguments,
    add_overwrite_argument,
    add_router_argument,
    parse_checked,
    run_script,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_arguments(parser)
    add_router_argument(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", nargs="+", help="LMDB files or folders of shards")
    data.add_argument("--data-root", type=Path, help="folder that holds a folder or file for each split")
    parser.add_argument(
        "--splits", nargs="+", help="names in --data-root (default: OC20's four validation splits)"
    )
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    add_overwrite_argument(parser)
    parser.add_argument("--figures", type=Path, help="folder for figures")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_atoms", type=int, help="most atoms in a batch")
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument(
        "--adsorbates",
        type=Path,
        help="names by system for the error table: a JSON object, or OC20's oc20_data_mapping.pkl",
    )
    parser.add_argument("--wandb-project", help="log to this Weights & Biases project")
    parser.add_argument("--wandb-entity", help="user or team (default: W&B's)")
    parser.add_argument("--wandb-offline", action="store_true", help="send nothing; keep W&B's files")
    return parse_checked(
        parser,
        needs=[
            ("--splits", "--data-root"),
            ("--overwrite", "--out"),
            ("--wandb-entity", "--wandb-project"),
            ("--wandb-offline", "--wandb-project"),
        ],
    )


def main() -> None:
    arguments = parse_arguments()
    from datasets_oc20.catalogue import VALIDATION_SPLITS, find_splits
    from datasets_oc20.raw_release import read_adsorbate_names
    from equiformer2.checkpoint import load_checkpoint
    from equiformer2.checkpoint.tensor_files import sha256
    from equiformer2.files import check_target
    from equiformer2.inference import Predictor
    from equiformer2.pruning.routing.router_files import for_evaluation
    from equiformer2.training import evaluation, evaluation_parts, wandb_report
    from equiformer2.training.folder import WandbSettings, import_wandb

    if arguments.out is not None:
        given = [arguments.checkpoint, *(arguments.data or [arguments.data_root])]
        given += [path for path in (arguments.router, arguments.adsorbates) if path is not None]
        check_target(arguments.out, inputs=given, overwrite=arguments.overwrite)
        check_target(evaluation_parts.parts_folder(arguments.out), is_folder=True)
    if arguments.figures is not None:
        check_target(arguments.figures, is_folder=True)
    wandb = WandbSettings(arguments.wandb_project, arguments.wandb_entity, arguments.wandb_offline)
    if wandb.project is not None:
        import_wandb("--wandb-project")
    if arguments.data_root is None:
        paths = {path: Path(path) for path in arguments.data}
    else:
        paths = find_splits(arguments.data_root, arguments.splits or VALIDATION_SPLITS)
    checkpoint = load_checkpoint(arguments.checkpoint, arguments.weights, arguments.energy_kind)
    predictor = Predictor(
        checkpoint,
        arguments.device,
        precision=arguments.precision,
        backend=arguments.backend,
        router=for_evaluation(arguments.router),
    )
    datasets = {
        name: evaluation.open_dataset(path, predictor, arguments.energy_kind) for name, path in paths.items()
    }
    print(f"{arguments.checkpoint}: {checkpoint.weights} weights, {checkpoint.energy_kind} energies")
    names = None if arguments.adsorbates is None else read_adsorbate_names(arguments.adsorbates)
    settings = {
        "adsorbates": None if arguments.adsorbates is None else sha256(arguments.adsorbates),
        "weights": checkpoint.weights,
        "precision": arguments.precision,
        "backend": arguments.backend,
    }
    if arguments.router is not None:
        settings["router"] = sha256(arguments.router)
    options = {
        "batch_size": arguments.batch_size,
        "max_atoms": arguments.max_atoms,
        "num_workers": arguments.num_workers,
        "adsorbate_names": names,
    }
    results = {}
    for number, (name, dataset) in enumerate(datasets.items()):
        kept = False
        if arguments.out is None:
            results[name] = evaluation.evaluate(predictor, dataset, **options)
        else:
            stem = name if arguments.data_root else f"{number}_{Path(name).stem}"
            part = evaluation_parts.parts_folder(arguments.out) / f"{stem}.npz"
            evaluated = evaluation_parts.what_is_evaluated(arguments.checkpoint, dataset, **settings)
            results[name], kept = evaluation_parts.evaluate_once(
                predictor, dataset, part, evaluated, **options
            )
        counts = f"{results[name].structures} structures of {results[name].systems} systems"
        print(f"{name}: {counts}{' (finished before)' if kept else ''}")
        print(evaluation.table(results[name]))
    if len(results) > 1:
        print(f"average of {len(results)}")
        print(evaluation.table_of_average(list(results.values())))
    if arguments.out is not None:
        evaluation.write_report(arguments.out, predictor, results)
        print(f"numbers: {arguments.out}")
    figures = []
    if arguments.figures is not None:
        figures = evaluation.draw_figures(arguments.figures, results)
        print(f"figures: {arguments.figures}")
    if wandb.project is not None:
        averaged = evaluation.average(list(results.values()))["metrics"]
        wandb_report.log_results(
            wandb,
            arguments.out.parent if arguments.out is not None else Path(),
            Path(arguments.checkpoint).stem,
            {"checkpoint": arguments.checkpoint, "energy_kind": checkpoint.energy_kind, **settings},
            {name: result.metrics for name, result in results.items()} | {"average": averaged},
            evaluation.pooled(results),
            figures,
        )


if __name__ == "__main__":
    run_script(main)

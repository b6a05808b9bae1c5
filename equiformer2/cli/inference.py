"""Commands that run a trained network: evaluate, predict, relax, relax-is2re, submission."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equiformer2.cli.chosen_model import ChosenModel, network_calculator
from equiformer2.cli.command import Command, Parser, Result
from equiformer2.cli.options import (
    NETWORK_ONLY,
    add_batch_arguments,
    add_dispersion_argument,
    add_draft_argument,
    add_model_arguments,
    add_overwrite_argument,
    add_relaxation_arguments,
    add_router_argument,
    add_spread_argument,
    add_twin_argument,
    only_one,
    parse_checked,
)
from equiformer2.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

    from datasets_oc20 import OC20Lmdb
    from equiformer2.inference import Predictor, RelaxationResult
    from equiformer2.training.evaluation import Evaluation


def _judge(predictor: "Predictor", dataset: "OC20Lmdb") -> dict[str, Any]:
    """Compare a dataset with the training data of a checkpoint, and print what is new to it."""
    from equiformer2.inference.seen_data import judge_dataset

    record = judge_dataset(predictor, dataset)
    for sentence in record["sentences"] if record["compared"] else []:
        print(f"WARNING: {sentence}")
    return record


def _add_split_arguments(parser: Parser, data: str, several: bool) -> None:
    """Add `--data`, or `--data-root` and `--splits`."""
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--data", nargs="+" if several else None, help=data)
    choice.add_argument("--data-root", type=Path, help="folder that holds a folder or file for each split")
    parser.add_argument(
        "--splits",
        nargs="+",
        help="names of splits in --data-root (default: OC20's four validation splits)",
    )


class Evaluate(Command):
    """Evaluate a checkpoint: OC20's S2EF metrics per dataset and on average, beside trivial baselines.

        equiformer2 evaluate --checkpoint best.pt --data-root oc20 --out results.json --figures figures

    evaluates on oc20/val_id, oc20/val_ood_ads, oc20/val_ood_cat and oc20/val_ood_both. With --out, finished
    datasets are kept beside it, and the same command goes on after a stop; once all are finished, --overwrite
    writes the numbers again.
    """

    def add_arguments(self, parser: Parser) -> None:
        add_model_arguments(parser)
        add_router_argument(parser)
        _add_split_arguments(parser, "LMDB files or folders of shards", several=True)
        parser.add_argument("--out", type=Path, help="JSON file for all numbers")
        add_overwrite_argument(parser)
        parser.add_argument("--figures", type=Path, help="folder for figures")
        add_batch_arguments(parser)
        parser.add_argument(
            "--adsorbates",
            type=Path,
            help="file with the adsorbate of each system, for the error table: a JSON object, or OC20's "
            "oc20_data_mapping.pkl",
        )
        parser.add_argument("--wandb-project", help="Weights & Biases project to log to")
        parser.add_argument(
            "--wandb-entity", help="Weights & Biases user or team (default: that of the account)"
        )
        parser.add_argument(
            "--wandb-offline", action="store_true", help="keep the files of Weights & Biases and send nothing"
        )

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        return parse_checked(
            parser,
            arguments,
            needs=[
                ("--splits", "--data-root"),
                ("--overwrite", "--out"),
                ("--wandb-entity", "--wandb-project"),
                ("--wandb-offline", "--wandb-project"),
            ],
        )

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.catalogue import VALIDATION_SPLITS, find_splits
        from equiformer2.files import write_json
        from equiformer2.inference import Predictor
        from equiformer2.inference.record import adapter_record
        from equiformer2.pruning.routing.router_files import evaluation_router
        from equiformer2.script import header
        from equiformer2.training import evaluation

        self._check_outputs(options)
        if options.data_root is None:
            paths = {path: Path(path) for path in options.data}
        else:
            paths = find_splits(options.data_root, options.splits or VALIDATION_SPLITS)
        predictor = Predictor(
            options.checkpoint,
            options.device,
            options.weights,
            options.energy_kind,
            options.precision,
            options.backend,
            router=evaluation_router(options.router),
            adapter=options.adapter,
        )
        checkpoint = predictor.checkpoint
        adapter = "" if options.adapter is None else f" with the adapter {options.adapter}"
        kind = f"{checkpoint.weights} weights, {checkpoint.energy_kind} energies"
        print(f"{options.checkpoint}{adapter}: {kind}")
        results = self._evaluate_all(options, predictor, paths)
        if len(results) > 1:
            print(f"average of {len(results)}")
            print(evaluation.table_of_average(list(results.values())))
        record = {
            **header("evaluate/1", options.checkpoint),
            **adapter_record(predictor),
            **evaluation.report(predictor, results),
            "familiarity": {
                name: _judge(predictor, evaluation.open_dataset(path, predictor, options.energy_kind))
                for name, path in paths.items()
            },
        }
        if options.out is not None:
            write_json(options.out, record, make_folder=True)
            print(f"numbers: {options.out}")
        figures: list[Path] = []
        if options.figures is not None:
            figures = evaluation.draw_figures(options.figures, results)
            print(f"figures: {options.figures}")
        if options.wandb_project is not None:
            self._log_to_wandb(options, predictor, results, figures)
        return Result(record)

    def _check_outputs(self, options: argparse.Namespace) -> None:
        from equiformer2.files import check_target
        from equiformer2.training.evaluation import parts_folder

        if options.out is not None:
            given = [options.checkpoint, *(options.data or [options.data_root])]
            others = (options.adapter, options.router, options.adsorbates)
            given += [path for path in others if path is not None]
            check_target(options.out, inputs=given, overwrite=options.overwrite)
            check_target(parts_folder(options.out), is_folder=True)
        if options.figures is not None:
            check_target(options.figures, is_folder=True)

    def _settings(self, options: argparse.Namespace, predictor: "Predictor") -> dict[str, Any]:
        """Settings on which the numbers depend, files by their SHA-256."""
        from equiformer2.checkpoint.tensor_files import sha256

        settings = {
            "adsorbates": None if options.adsorbates is None else sha256(options.adsorbates),
            "weights": predictor.checkpoint.weights,
            "precision": options.precision,
            "backend": options.backend,
        }
        files = {"adapter": options.adapter, "router": options.router}
        return settings | {name: sha256(file) for name, file in files.items() if file is not None}

    def _evaluate_all(
        self, options: argparse.Namespace, predictor: "Predictor", paths: dict[str, Path]
    ) -> "dict[str, Evaluation]":
        from datasets_oc20.raw_release import read_adsorbate_names
        from equiformer2.training import evaluation

        datasets = {
            name: evaluation.open_dataset(path, predictor, options.energy_kind)
            for name, path in paths.items()
        }
        settings = self._settings(options, predictor)
        limits = {
            "batch_size": options.batch_size,
            "max_atoms": options.max_atoms,
            "num_workers": options.num_workers,
            "adsorbate_names": options.adsorbates and read_adsorbate_names(options.adsorbates),
        }
        results = {}
        for number, (name, dataset) in enumerate(datasets.items()):
            kept = None
            if options.out is not None:
                stem = name if options.data_root else f"{number}_{Path(name).stem}"
                part = evaluation.parts_folder(options.out) / f"{stem}.npz"
                same = evaluation.evaluation_settings(options.checkpoint, dataset, **settings)
                kept = evaluation.Evaluation.load(part, same)
            results[name] = kept or evaluation.evaluate(predictor, dataset, **limits)
            if options.out is not None and kept is None:
                results[name].save(part, same)
            counts = f"{results[name].structures} structures of {results[name].systems} systems"
            print(f"{name}: {counts}{' (finished before)' if kept else ''}")
            print(results[name].table())
        return results

    def _log_to_wandb(
        self,
        options: argparse.Namespace,
        predictor: "Predictor",
        results: "dict[str, Evaluation]",
        figures: list[Path],
    ) -> None:
        from equiformer2.training import evaluation
        from equiformer2.training.wandb_logging import WandbSettings, log_results

        averaged = evaluation.average(list(results.values()))["metrics"]
        log_results(
            WandbSettings(options.wandb_project, options.wandb_entity, options.wandb_offline),
            options.out.parent if options.out is not None else Path(),
            Path(options.checkpoint).stem,
            {
                "checkpoint": options.checkpoint,
                "energy_kind": predictor.energy_kind,
                **self._settings(options, predictor),
            },
            {name: result.metrics for name, result in results.items()} | {"average": averaged},
            evaluation.pooled(results),
            figures,
        )


class Predict(Command):
    """Predict energies, and forces where the model has them, of a dataset.

    Energies are in eV, forces in eV/Å. The file is an .npz archive or JSON.
    """

    def add_arguments(self, parser: Parser) -> None:
        add_model_arguments(parser)
        parser.add_argument(
            "--data",
            required=True,
            help="LMDB file, folder of shards, or any file with structures that ASE reads",
        )
        parser.add_argument("--out", required=True, type=Path, help="file to write, .npz or .json")
        add_batch_arguments(parser)
        add_overwrite_argument(parser)

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20 import open_dataset
        from equiformer2.files import check_target
        from equiformer2.inference import Predictor
        from equiformer2.inference.record import adapter_record
        from equiformer2.training.prediction import check_output, predict_dataset, write_predictions

        check_output(options.out)
        given = [file for file in (options.checkpoint, options.adapter, options.data) if file is not None]
        check_target(options.out, inputs=given, overwrite=options.overwrite)
        predictor = Predictor(
            options.checkpoint,
            options.device,
            options.weights,
            options.energy_kind,
            options.precision,
            options.backend,
            adapter=options.adapter,
        )
        checkpoint = predictor.checkpoint
        dataset = open_dataset(options.data, needs_energy=False)
        arrays = predict_dataset(
            predictor.predict_batches,
            dataset,
            options.batch_size,
            options.max_atoms,
            options.num_workers,
        )
        write_predictions(options.out, arrays)
        forces = "forces in eV/Å" if "forces" in arrays else "no forces, which the model does not predict"
        structures = len(arrays["energy"])
        print(
            f"{options.out}: {structures} structures, {checkpoint.energy_kind} energies in eV, "
            f"{forces}, {checkpoint.weights} weights"
        )
        record = {
            "file": str(options.out),
            "structures": structures,
            "energy_kind": checkpoint.energy_kind,
            "weights": checkpoint.weights,
            "arrays": sorted(arrays),
            "familiarity": _judge(predictor, dataset),
            **adapter_record(predictor),
        }
        return Result(record, checkpoint=options.checkpoint)


class Relax(Command):
    """Relax a structure with a trained EquiformerV2.

    Free atoms move until no force exceeds --fmax; constraints stored in the file hold. What the energy means
    (adsorption or total) depends on the checkpoint and is printed. A relaxation that has not converged after
    all its steps is written all the same; the last line says so, and the exit status is 3.

        equiformer2 relax slab.traj --checkpoint oc20_small --out runs/relax

    Several checkpoints are a committee: its mean relaxes, and the record and every frame of the trajectory
    hold the spread. With --stop-at-spread the relaxation ends, with exit status 3, where its members differ.

        equiformer2 relax slab.traj --checkpoint seed0.pt seed1.pt seed2.pt --stop-at-spread 0.5

    Any ASE calculator can stand in place of a network, and a cheap network can relax first:

        equiformer2 relax slab.traj --calculator emt
        equiformer2 relax slab.traj --checkpoint full.pt --draft pruned.pt
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument("file", nargs="?", metavar="FILE", help="structure file of any format of ASE")
        parser.add_argument("--structure", metavar="FILE", help="structure file, in place of FILE")
        add_model_arguments(parser, committee=True, calculator=True)
        add_dispersion_argument(parser)
        add_twin_argument(parser)
        add_draft_argument(parser)
        add_spread_argument(parser)
        add_router_argument(parser)
        parser.add_argument(
            "--replan-every",
            type=int,
            metavar="N",
            help="number of steps for which a router that jumps keeps its choice (default: the number in its "
            "file, or 10)",
        )
        parser.add_argument(
            "--index", type=_frame, default=-1, help="number of a frame of the file (default: -1, the last)"
        )
        add_relaxation_arguments(parser)
        parser.add_argument(
            "--energy-every",
            type=int,
            help="number of steps between energies in the trajectory (default: 1; with --router the first "
            "and the last frame alone have one)",
        )
        parser.add_argument(
            "--forces-on-fixed",
            action="store_true",
            help="compute the forces on held atoms, which are zero otherwise",
        )
        parser.add_argument("--out", default="runs/relax", help="output folder (default: %(default)s)")
        add_overwrite_argument(parser)

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        excludes = [*NETWORK_ONLY, ("--replan-every", "--calculator"), ("--forces-on-fixed", "--calculator")]
        options = parse_checked(parser, arguments, excludes=excludes)
        if options.structure is not None and options.file is not None:
            parser.error("argument --structure: not allowed with argument FILE")
        if options.structure is None and options.file is None:
            # A FILE behind the checkpoints is read as one of them.
            if options.checkpoint is None or len(options.checkpoint) == 1:
                parser.error("one of the arguments FILE --structure is required")
            options.file = options.checkpoint.pop()
        return options

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.structure_files import read_structure
        from equiformer2.files import read_json
        from equiformer2.inference.record import (
            RELAXATION_RECORD,
            RUN_FILES,
            claim_folder,
            draft_record,
            write_relaxation_record,
        )
        from equiformer2.inference.relaxation import relax_with_draft
        from equiformer2.pruning.routing import FrozenPlan
        from equiformer2.pruning.routing.router_files import relaxation_router
        from equiformer2.script import show_log

        show_log()
        file = options.structure or options.file
        structure = read_structure(file, options.index)
        router = relaxation_router(options.router, options.replan_every)
        chosen = ChosenModel(options, router)
        if chosen.dispersion is not None and chosen.energy_kind == "adsorption":
            raise InputError(
                "D3 of a whole structure added to an adsorption energy means nothing: use `adsorption "
                "energy` or `adsorption search`, which subtract that of slab and gases"
            )
        draft_calculator = None if options.draft is None else network_calculator(options, options.draft)
        inputs = [file, *chosen.files, *filter(None, [options.router, options.draft])]
        folder = claim_folder(options.out, RELAXATION_RECORD, options.overwrite, inputs, RUN_FILES)
        result, draft = relax_with_draft(
            structure,
            chosen.calculator,
            draft_calculator,
            folder,
            optimizer=options.optimizer,
            fmax=options.fmax,
            steps=options.steps,
            progress=True,
            forces_on_fixed=options.forces_on_fixed,
            energy_every=options.energy_every,
            stop_at_spread=options.stop_at_spread,
        )
        model = chosen.record([structure, result.atoms])
        if router is not None:
            model["router"] = options.router
            model["replan_every"] = router.replan_every if isinstance(router, FrozenPlan) else None
        if chosen.dispersion is not None:  # part of the energy
            model["d3"] |= {"energy_eV": chosen.dispersion.energy(result.atoms)}
        drafted = None if options.draft is None else draft_record(options.draft, draft)
        write_relaxation_record(folder, structure, result, model, drafted)
        self._report(folder, chosen, structure, result, draft)
        record = read_json(folder / RELAXATION_RECORD)
        return Result(record, 0 if result.converged else 3, chosen.checkpoint)

    @staticmethod
    def _report(
        folder: Path,
        chosen: ChosenModel,
        structure: "Atoms",
        result: "RelaxationResult",
        draft: "RelaxationResult | None",
    ) -> None:
        """Print the result in plain words."""
        from equiformer2.inference.meaning import warning_for
        from equiformer2.inference.record import RELAXATION_RECORD

        print(f"saved in {folder}: {RELAXATION_RECORD}, trajectory, relaxed structure, pictures")
        if warning_for(structure, chosen.energy_kind) is None:
            print(f"{chosen.energy_kind} energy: {result.energy:.4f} eV")
        else:  # the log has said why
            print(f"model output: {result.energy:.4f}, which is not an energy of this structure")
        if chosen.committee:
            print(
                f"spread of {len(chosen.checkpoint or [])} networks: energy {result.energy_std:.4f} eV, "
                f"largest of a force {result.force_spreads[-1]:.4f} eV/Å (on the way "
                f"{max(result.force_spreads):.4f})"
            )
        if draft is not None:
            print(
                f"calls: {result.evaluations} of the full model, after {draft.evaluations} of the draft "
                f"(its end: {draft.outcome()})"
            )
        print(f"{result.atoms.get_chemical_formula()}: {result.outcome()}")


def _frame(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the number of one frame, such as 0 or -1: one structure is relaxed at a time; "
            "many are relaxed by `equiformer2 relax-is2re`, from an LMDB, or by a loop over --index"
        ) from None


class RelaxIs2re(Command):
    r"""Relax the systems of IS2RE data with a checkpoint and compare with DFT (IS2RE and IS2RS).

        equiformer2 relax-is2re --checkpoint best.pt --data-root is2re/all --splits val_id val_ood_ads \
            --energy-kind adsorption --device cuda --out runs/is2re

    Several checkpoints are a committee, whose mean relaxes and whose spread is kept.
    Each dataset has a folder in --out with one trajectory per system. The same command goes on after a stop;
    a finished folder is read again, or extended by other splits, with --overwrite.
    Structures that cannot be relaxed are skipped and named.
    """

    def add_arguments(self, parser: Parser) -> None:
        add_model_arguments(parser, committee=True)
        add_spread_argument(parser)
        add_router_argument(parser)
        _add_split_arguments(parser, "LMDB file or folder of shards, one structure per system", several=False)
        parser.add_argument("--out", required=True, type=Path, help="output folder")
        add_overwrite_argument(
            parser, "write the report of a finished --out again; finished relaxations are kept"
        )
        parser.add_argument(
            "--fmax",
            type=float,
            default=0.02,
            help="convergence threshold of the largest force on a free atom, eV/Å (default: %(default)s)",
        )
        parser.add_argument(
            "--steps",
            type=int,
            default=200,
            help="maximum number of steps per structure (default: %(default)s)",
        )
        parser.add_argument(
            "--max-step",
            type=float,
            default=0.04,
            help="largest move of an atom in a step, Å (default: %(default)s)",
        )
        parser.add_argument(
            "--memory",
            type=int,
            default=50,
            help="number of steps that LBFGS remembers (default: %(default)s)",
        )
        parser.add_argument(
            "--frames",
            choices=("all", "ends"),
            default="all",
            help="frames that trajectories keep (default: %(default)s)",
        )
        add_batch_arguments(parser, batch_size=32, workers=False)
        parser.add_argument(
            "--require-convergence",
            action="store_true",
            help="exit with status 3 unless every system was relaxed and has converged",
        )

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        options = parse_checked(parser, arguments, needs=[("--splits", "--data-root")])
        if len(options.checkpoint) > 1 and options.router is not None:
            parser.error("--router belongs to one network: leave it out, or give one checkpoint")
        if len(options.checkpoint) == 1 and options.stop_at_spread is not None:
            parser.error("--stop-at-spread needs a committee: give several checkpoints")
        return options

    def run(self, options: argparse.Namespace) -> Result:
        from equiformer2.files import check_target, write_json
        from equiformer2.script import header
        from equiformer2.training.relaxation_run import REPORT, average_over, coverage, metric_lines

        check_target(options.out, is_folder=True)
        given = [*options.checkpoint, options.data or options.data_root]
        given += [file for file in (options.adapter, options.router) if file is not None]
        check_target(options.out / REPORT, inputs=given, overwrite=options.overwrite)
        reports = self._relax_all(options)
        average = average_over(reports)
        if len(reports) > 1:
            print("\n".join([f"average of {len(reports)}", *metric_lines(average)]))
            if any(report["skipped"] for report in reports.values()):
                print(f"  All of this is of {coverage(reports.values())}: the others were skipped")
        keys = ("structures", "relaxed", "converged")
        counts = {key: sum(report[key] for report in reports.values()) for key in keys}
        first = next(iter(reports.values()))
        record = {
            **header("relax-is2re/1", self._files(options)),
            **{name: first[name] for name in ("adapter", "adapter_sha256") if name in first},
            "datasets": reports,
            **counts,
            "average": average,
        }
        write_json(options.out / REPORT, record)
        if counts["converged"] == counts["structures"]:
            return Result(record)
        left = counts["structures"] - counts["converged"]
        print(f"NOT converged: {left} of {counts['structures']} structures")
        return Result(record, 3 if options.require_convergence else 0)

    @staticmethod
    def _files(options: argparse.Namespace) -> Any:
        """The checkpoint, or the list of a committee's."""
        return only_one(options.checkpoint)

    def _relax_all(self, options: argparse.Namespace) -> dict[str, Any]:
        """Reports of all datasets by name."""
        from datasets_oc20.catalogue import VALIDATION_SPLITS, find_splits
        from equiformer2.inference.batched import RelaxationSettings
        from equiformer2.inference.committee import open_model
        from equiformer2.pruning.routing.router_files import batched_relaxation_router
        from equiformer2.script import show_log
        from equiformer2.training.relaxation_run import open_starts, relax_dataset, relaxation_table

        settings = RelaxationSettings(
            options.fmax,
            options.steps,
            options.max_step,
            options.memory,
            frames=options.frames,
            stop_at_spread=options.stop_at_spread,
        )
        if options.data_root is None:
            paths = {Path(options.data).resolve().stem: Path(options.data)}
        else:
            paths = find_splits(options.data_root, options.splits or VALIDATION_SPLITS)
        predictor = open_model(
            options.checkpoint,
            options.device,
            options.weights,
            options.energy_kind,
            options.precision,
            options.backend,
            batched_relaxation_router(options.router),
            adapter=options.adapter,
        )
        show_log()
        datasets = {name: open_starts(path, predictor, options.energy_kind) for name, path in paths.items()}
        reports = {}
        for name, dataset in datasets.items():
            reports[name] = relax_dataset(
                predictor,
                self._files(options),
                dataset,
                options.out / name,
                settings,
                options.batch_size,
                options.max_atoms,
                options.router,
            )
            print(f"{name}: {options.out / name}")
            print(relaxation_table(reports[name]))
        return reports


class Submission(Command):
    r"""Make a file for the OC20 leaderboard from predictions on its four test sets, or check one.

        equiformer2 submission --task s2ef --id id.npz --ood-ads ood_ads.npz --ood-cat ood_cat.npz \
            --ood-both ood_both.npz --out s2ef.npz
        equiformer2 submission --task is2re --id runs/is2re/test_id ... --out is2re.npz
        equiformer2 submission --validate s2ef.npz

    S2EF takes the .npz of `equiformer2 predict` for each test set, IS2RE the folders of
    `equiformer2 relax-is2re`.
    """

    def add_arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "--validate", type=Path, metavar="FILE", help="submission file to check; none is made"
        )
        parser.add_argument("--task", choices=("s2ef", "is2re"), help="task of the leaderboard")
        for split in ("id", "ood-ads", "ood-cat", "ood-both"):
            parser.add_argument(f"--{split}", type=Path, help=f"predictions of the test set {split}")
        parser.add_argument("--out", type=Path, help=".npz file to write")
        parser.add_argument(
            "--atoms",
            choices=("free", "all"),
            default="free",
            help="atoms whose forces S2EF files hold (default: %(default)s; only free atoms are scored)",
        )
        parser.add_argument(
            "--dtype",
            choices=("float32", "float16"),
            default="float32",
            help="type of the numbers in the file (default: %(default)s)",
        )
        parser.add_argument(
            "--data-root",
            type=Path,
            help="folder of the test sets test_id, test_ood_ads, …, with which the file is compared",
        )
        add_overwrite_argument(parser)

    def parse(self, parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
        making = ("--id", "--ood-ads", "--ood-cat", "--ood-both", "--out", "--atoms", "--dtype")
        excludes = [*((option, "--validate") for option in making), ("--atoms", "--task=is2re")]
        options = parse_checked(parser, arguments, excludes=excludes)
        if options.validate is None and (options.task is None or options.out is None):
            parser.error("give --task, the four predictions and --out, or --validate FILE")
        return options

    def run(self, options: argparse.Namespace) -> Result:
        from datasets_oc20.catalogue import find_splits
        from equiformer2.errors import InputError
        from equiformer2.files import check_target
        from equiformer2.training.submission import SPLITS, make_submission, write_submission
        from equiformer2.training.submission_checks import problems_beside_data, submission_problems

        data = {}
        if options.data_root is not None:
            tests = find_splits(options.data_root, [f"test_{split}" for split in SPLITS])
            data = dict(zip(SPLITS, tests.values(), strict=True))
        file = options.validate
        if file is None:
            file = options.out
            if file.suffix != ".npz":
                raise InputError(f"{file}: the leaderboard takes .npz files, give this ending")
            given = {split: getattr(options, split) for split in SPLITS}
            predictions = {split: path for split, path in given.items() if path is not None}
            check_target(file, inputs=predictions.values(), overwrite=options.overwrite)
            write_submission(file, make_submission(options.task, predictions, options.atoms, options.dtype))
            print(f"{file}: {options.task} for {', '.join(SPLITS)}")
        problems = submission_problems(file, options.task)
        if data and not problems:
            problems = problems_beside_data(file, data)
        for problem in problems:
            print(f"error: {file}: {problem}", file=sys.stderr)
        if not problems:
            print(f"{file}: nothing wrong was found")
        return Result({"file": str(file), "problems": problems}, 2 if problems else 0)

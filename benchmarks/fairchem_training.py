"""One training by fairchem-core's own trainer, on what `loss_curve_data` prepared.

    REFERENCE_PYTHON -m benchmarks.fairchem_training FOLDER SEED

Runs in the reference's environment and imports nothing of this project's packages. The trainer is
`equiformerv2_forces` (`OCPTrainer` with the cosine schedule) as fairchem-core 1.10 ships it: its data set,
collation, normalizers, losses, AdamW with its groups, schedule, clipping, moving average and checkpoint.
Three things are told to it from outside: initial weights, order of the structures and the place of its log.

Standard output has one JSON object per line: the comparison of graphs, then one per step, then the end.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common.logger import Logger
from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2 import equiformer_v2_deprecated  # noqa: F401  (registers the network)
from fairchem.core.models.equiformer_v2.trainers.forces_trainer import EquiformerV2ForcesTrainer

from benchmarks.fairchem_network import load_parameters

Write = Callable[[dict[str, Any]], None]


def train(folder: Path, seed: int, write: Write) -> None:
    """Train once.

    Args:
        folder: of the preparation; the trainer's files go to `reference_SEED` in it.
        seed: seed of the global generators, which draw nothing but the edge frames.
        write: takes a row of the log, and the comparison of graphs before and the checkpoint after them.
    """
    shared = json.loads((folder / "shared.json").read_text(encoding="utf-8"))
    weights = torch.load(folder / "weights.pt", weights_only=True)["weights"]["raw"]

    @registry.register_logger("rows")
    class Rows(Logger):
        """The trainer's log, a row per step; the norm of the gradients comes in a call of its own."""

        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config)
            self.row: dict[str, float] = {}

        def log(self, update_dict: dict[str, Any], step: int, split: str = "") -> None:
            self.row |= {name: float(value) for name, value in update_dict.items()}
            if "loss" in update_dict:
                write(self.row)
                self.row = {}

        def watch(self, *_: Any) -> None: ...
        def log_plots(self, *_: Any) -> None: ...
        def mark_preempting(self) -> None: ...
        def log_summary(self, *_: Any) -> None: ...
        def log_artifact(self, *_: Any) -> None: ...

    class Trainer(EquiformerV2ForcesTrainer):
        """fairchem's trainer with given weights and a given order."""

        def load_model(self) -> None:
            super().load_model()
            load_parameters(self.model, weights)

        def load_datasets(self) -> None:
            super().load_datasets()
            self.train_dataset.indices = shared["order"]
            self.train_sampler.sampler.shuffle = False

    trainer = Trainer(**trainer_arguments(shared, folder, seed))
    if seed == 0:
        write({"graphs": compare_graphs(trainer)})
    trainer.train()
    decaying = {id(parameter) for parameter in trainer.optimizer.param_groups[1]["params"]}
    checkpoint = Path(trainer.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt"
    write(
        {
            "checkpoint": str(checkpoint.relative_to(folder)),
            "decaying": sorted(name for name, p in trainer.model.named_parameters() if id(p) in decaying),
        }
    )


def trainer_arguments(shared: dict[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """Translate the shared settings to the keys of fairchem's trainer."""
    optim, forces = (
        shared["optim"],
        {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
    )
    return {
        "task": {},
        "model": {"name": "equiformer_v2", **shared["model"]},
        "outputs": {"energy": {"level": "system"}, "forces": forces},
        "dataset": {
            "train": {
                "format": "lmdb",
                "src": str(folder / "structures.lmdb"),
                "key_mapping": {"y": "energy", "force": "forces"},
                "no_shuffle": True,
                "transforms": {
                    "normalizer": {
                        name: {"mean": mean, "rmsd": std}
                        for name, (mean, std) in shared["normalizers"].items()
                    }
                },
            }
        },
        "optimizer": {
            "batch_size": shared["batch_size"],
            "num_workers": 0,
            "lr_initial": optim["lr"],
            "optimizer": "AdamW",
            "optimizer_params": {"weight_decay": optim["weight_decay"], "betas": tuple(optim["betas"])},
            "scheduler": "LambdaLR",
            "scheduler_params": {
                "lambda_type": "cosine",
                "warmup_factor": optim["warmup_factor"],
                "warmup_epochs": optim["warmup_epochs"],
                "lr_min_factor": optim["lr_min_factor"],
            },
            "max_epochs": 1,
            "clip_grad_norm": optim["clip_grad_norm"],
            "ema_decay": shared["ema_decay"],
        },
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": shared["energy_coefficient"]}},
            {"forces": {"fn": "l2mae", "coefficient": shared["force_coefficient"]}},
        ],
        "evaluation_metrics": {
            "metrics": {"energy": ["mae"], "forces": ["mae"]},
            "primary_metric": "forces_mae",
        },
        "identifier": "",
        "timestamp_id": "run",
        "local_rank": 0,
        "run_dir": str(folder / f"reference_{seed}"),
        "print_every": 1,
        "seed": seed,
        "logger": "rows",
        "cpu": True,
        "name": "s2ef",
    }


def compare_graphs(trainer: EquiformerV2ForcesTrainer) -> dict[str, float]:
    """Compare the stored edges, which both trainings use, with those that fairchem would choose itself.

    Returns:
        Numbers of structures, of those with another edge, of edges, of other edges; and the largest
        difference in length (Å) between an edge and the one in its place: rounding where they are tied.
    """
    model, counts = trainer.model, {"structures": 0, "structures_differ": 0, "edges": 0, "edges_differ": 0}
    widest = 0.0
    for batch in trainer.train_loader:
        mine, theirs = (
            model.generate_graph(batch, otf_graph=search, enforce_max_neighbors_strictly=True)
            for search in (False, True)
        )
        lengths: list[dict[tuple[int, ...], float]] = []
        for graph in (mine, theirs):
            rows = torch.cat([graph.edge_index.T, graph.cell_offsets.long()], dim=1).tolist()
            distances = graph.edge_distance.tolist()
            lengths.append({tuple(row): value for row, value in zip(rows, distances, strict=True)})
        alone = [
            sorted((edge[1], one[edge]) for edge in one.keys() - other.keys())
            for one, other in (lengths, lengths[::-1])
        ]
        structures = {int(batch.batch[target]) for target, _ in alone[0]}
        # Both keep the same number of edges per atom, so the sorted ones stand beside each other.
        widest = max([widest, *(abs(a - b) for (_, a), (_, b) in zip(*alone, strict=True))])
        counts["structures"] += batch.num_graphs
        counts["structures_differ"] += len(structures)
        counts["edges"] += len(lengths[0])
        counts["edges_differ"] += len(alone[0])
    return {**counts, "widest_tie": widest}


def main() -> None:
    # Libraries may print; only rows may reach the driver.
    rows = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(row: dict[str, Any]) -> None:
        rows.write(json.dumps(row) + "\n")
        rows.flush()

    logging.disable(logging.INFO)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train(Path(sys.argv[1]), int(sys.argv[2]), write)


if __name__ == "__main__":
    main()

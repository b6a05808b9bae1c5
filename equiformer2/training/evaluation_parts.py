"""Finished datasets of an evaluation, kept so that a stopped evaluation goes on with the others."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from datasets_oc20 import OC20Lmdb
from datasets_oc20.npz_file import read_npz
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.files import write_bytes
from equiformer2.inference import Predictor
from equiformer2.training import evaluation as judging
from equiformer2.training.breakdown import Breakdown
from equiformer2.training.evaluation import Evaluation

#: Rises when the stored numbers change their meaning.
_VERSION = 2


def parts_folder(report: Path) -> Path:
    """Where the finished datasets of the evaluation `report` are kept."""
    return report.with_name(f"{report.stem}.parts")


def evaluate_once(
    predictor: Predictor, dataset: OC20Lmdb, part: Path, evaluated: dict[str, Any], **options: Any
) -> tuple[Evaluation, bool]:
    """`evaluate` with `options`, unless `part` keeps its result already.

    Returns:
        the result, and whether it was kept from an earlier run.
    """
    kept = load_part(part, evaluated)
    if kept is not None:
        return kept, True
    found = judging.evaluate(predictor, dataset, **options)
    save_part(part, found, evaluated)
    return found, False


def what_is_evaluated(checkpoint: Path, dataset: OC20Lmdb, **settings: Any) -> dict[str, Any]:
    """Everything that the numbers depend on; `settings` such as weights and precision are plain values.

    Raises:
        OSError: a file is missing or unreadable.
    """
    files = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in dataset.shards]
    return {
        "version": _VERSION,
        "checkpoint": sha256(checkpoint),
        "energy_kind": dataset.energy_kind,
        "structures": len(dataset),
        "files": [list(file) for file in files],
        **settings,
    }


def save_part(path: Path, evaluation: Evaluation, evaluated: dict[str, Any]) -> None:
    """Write one finished dataset, whole or not at all."""
    numbers = {
        "evaluated": evaluated,
        "metrics": evaluation.metrics,
        "baselines": evaluation.baselines,
        "mean_energy_of": evaluation.mean_energy_of,
        "structures": evaluation.structures,
        "systems": evaluation.systems,
        "free_atoms": evaluation.free_atoms,
        "breakdown": evaluation.breakdown.state(),
    }
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        numbers=np.array(json.dumps(numbers)),
        energy_pairs=evaluation.energy_pairs,
        force_pairs=evaluation.force_pairs,
    )
    write_bytes(path, buffer.getvalue(), make_folder=True)


def load_part(path: Path, evaluated: dict[str, Any]) -> Evaluation | None:
    """The dataset as `save_part` left it; None where there is none, or of something else by now."""
    if not path.is_file():
        return None
    try:
        stored, energy_pairs, force_pairs = read_npz(path, ("numbers", "energy_pairs", "force_pairs"))
        numbers = json.loads(str(stored))
        if numbers.pop("evaluated") != evaluated:
            return None
        numbers["breakdown"] = Breakdown(**numbers["breakdown"])
        return Evaluation(energy_pairs=energy_pairs, force_pairs=force_pairs, **numbers)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return None  # not ours, or of another version: evaluating again is always right

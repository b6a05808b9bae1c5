"""The redundancy report: what every block, head, channel and part of a network does and costs."""

import csv
import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.files import write_bytes, write_json
from equiformer2.inference import Predictor
from equiformer2.inference.predictor import matmul_precision
from equiformer2.pruning.analysis.lossless import Saving, measure_savings
from equiformer2.pruning.analysis.observe import time_parts
from equiformer2.pruning.analysis.redundancy import BlockStatistics, block_statistics
from equiformer2.pruning.analysis.report_figure import PartCost, draw
from equiformer2.pruning.cost.operations import MacCount, count_macs
from equiformer2.pruning.structured.importance import (
    UNITS,
    Importance,
    gradient_importances,
    labelled,
    magnitude_importance,
    probe,
)

#: Written last: a folder without it holds an unfinished report.
RECORD = "report.json"


@dataclass(frozen=True)
class Report:
    """Everything in it, as plain numbers.

    Attributes:
        source: what was looked at: files, weights, backend, numbers of structures, atoms and edges.
        statistics: per block and tag.
        importance: by method (`michel`, `taylor`, `magnitude`).
        parts: of a forward pass over the first batch.
        savings: what inference leaves out, measured on the first batch.
    """

    source: Mapping[str, Any]
    statistics: Sequence[BlockStatistics]
    importance: Mapping[str, Importance]
    parts: Sequence[PartCost]
    savings: Sequence[Saving]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": dict(self.source),
            "blocks": [dataclasses.asdict(row) for row in self.statistics],
            "importance": {method: values.to_dict() for method, values in self.importance.items()},
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "lossless": [saving.to_dict() for saving in self.savings],
        }


def make_report(
    predictor: Predictor,
    structures: Sequence[Data],
    *,
    batch_size: int = 4,
    objective: Literal["probe", "labels"] = "probe",
    repeats: int = 10,
    seed: int = 0,
    source: Mapping[str, Any] | None = None,
) -> Report:
    """Measure everything on `structures`; progress is shown on a terminal.

    Args:
        predictor: the network as inference runs it.
        structures: at least one; with `energy` and `forces` for the objective `labels`.
        batch_size: structures per forward pass; the first batch is the timed one.
        objective: of the importance; see `importance.probe` and `importance.labelled`.
        repeats: timed passes.
        seed: of the directions of `probe`.
        source: what to say about the origin of network and structures.

    Raises:
        InputError: no structures, missing labels, a structure that the network cannot take.
    """
    if not structures:
        raise InputError("there are no structures to look at: give at least one")
    if batch_size < 1 or repeats < 1:
        raise InputError(f"batch_size is {batch_size} and repeats is {repeats}: give 1 or more")
    model, normalizers = predictor.model, predictor.checkpoint.normalizers
    if objective == "labels":
        wanted = ("energy", "forces") if predictor.has_forces else ("energy",)
        for structure in structures:
            lacking = [name for name in wanted if name not in structure]
            if lacking:
                raise InputError(
                    f"structure {structure.sid}/{structure.fid} has no {lacking[0]}: "
                    "use the objective 'probe'"
                )
    chosen = labelled(normalizers) if objective == "labels" else probe(normalizers, seed=seed)
    batches = [
        Batch.from_data_list(_alike(structures[start : start + batch_size]))
        for start in range(0, len(structures), batch_size)
    ]
    first = batches[0].clone().to(predictor.device)
    with matmul_precision(predictor.precision, predictor.device):
        statistics = block_statistics(model, _shown(batches, "features"))
        seconds = time_parts(model, first, repeats)
        savings = measure_savings(model, first, normalizers, repeats)
        edges = len(model.build_graph(first).distances)
    importance = {
        **gradient_importances(model, _shown(structures, "importance"), chosen),
        "magnitude": magnitude_importance(model),
    }
    facts = {
        "weights": predictor.checkpoint.weights,
        "backend": model.backend,
        "precision": predictor.precision,
        "device": str(predictor.device),
        "threads": torch.get_num_threads(),
        "objective": objective,
        "structures": len(structures),
        "systems": len({structure.sid for structure in structures}),
        "atoms": sum(int(structure.natoms) for structure in structures),
        "timed_batch": {"structures": len(first.natoms), "atoms": len(first.pos), "edges": edges},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return Report(
        source={**(source or {}), **facts},
        statistics=statistics,
        importance=importance,
        parts=_parts(count_macs(model, len(first.pos), edges), seconds),
        savings=savings,
    )


def write(report: Report, folder: AnyPath) -> list[Path]:
    """Tables as CSV, the figure, and last everything as JSON; returns the paths."""
    folder = Path(folder)
    written = [
        _csv(folder / "blocks.csv", _block_rows(report)),
        _csv(folder / "units.csv", _unit_rows(report)),
        _csv(folder / "parts.csv", [dataclasses.asdict(part) for part in report.parts]),
        _csv(folder / "lossless.csv", _saving_rows(report)),
        write_bytes(folder / "report.png", draw(report.statistics, report.importance, report.parts)),
    ]
    return [*written, write_json(folder / RECORD, report.to_dict())]


def needed(importance: Tensor, share: float = 0.9) -> int:
    """How many units, the most important ones first, hold `share` of the importance of all."""
    ranked = importance.double().sort(descending=True).values.cumsum(0)
    if not len(ranked) or float(ranked[-1]) == 0:
        return 0
    return int((ranked < share * ranked[-1]).sum()) + 1


def _alike(structures: Sequence[Data]) -> list[Data]:
    """Copies with the same fields, which a batch needs: labels are left out."""
    fields = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "tags", "fixed", "sid", "fid")
    return [Data(**{name: structure[name] for name in fields}) for structure in structures]


def _shown(items: Sequence[Any], label: str) -> Any:
    return tqdm(items, desc=label, disable=None, leave=False)


def _parts(macs: MacCount, seconds: Mapping[str, float]) -> list[PartCost]:
    counts = {"edges": macs.edge_degree, "energy_head": macs.energy_head}
    counts["force_head"] = sum(macs.force_head.values())
    for number, block in enumerate(macs.blocks):
        counts[f"blocks.{number}.feed_forward"] = block.get("feed_forward", 0)
        attention = sum(value for name, value in block.items() if name != "feed_forward")
        counts[f"blocks.{number}.attention"] = attention
    ordered = ["graph", "edges"]
    for number in range(len(macs.blocks)):
        ordered += [f"blocks.{number}.attention", f"blocks.{number}.feed_forward"]
    ordered += ["energy_head", "force_head", "other"]
    return [PartCost(name, counts.get(name, 0), seconds[name]) for name in ordered if name in seconds]


def _block_rows(report: Report) -> list[dict[str, Any]]:
    rows = []
    for row in report.statistics:
        values = dataclasses.asdict(row)
        degrees, heads = values.pop("cosine_by_degree"), values.pop("entropy")
        values |= {f"cosine_l{l}": value for l, value in enumerate(degrees)}
        values |= {f"entropy_head{head}": value for head, value in enumerate(heads)}
        rows.append(values)
    return rows


def _unit_rows(report: Report) -> list[dict[str, Any]]:
    blocks = len(report.importance["magnitude"].heads)
    rows: list[dict[str, Any]] = []
    for unit, block in itertools.product(UNITS, range(blocks)):
        columns = {
            method: getattr(values, unit)[block].tolist() for method, values in report.importance.items()
        }
        for index, values in enumerate(zip(*columns.values(), strict=True)):
            row = {"unit": unit, "block": block, "index": index}
            rows.append(row | dict(zip(columns, values, strict=True)))
    return rows


def _saving_rows(report: Report) -> list[dict[str, Any]]:
    rows = []
    for saving in report.savings:
        values = saving.to_dict()
        latency, edges = values.pop("latency"), values.pop("edges") or {}
        values |= {f"latency_{name}": value for name, value in latency.items()}
        rows.append(values | {"edges_in_force_head": edges.get("force head")})
    return rows


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_bytes(path, text.getvalue().encode(), make_folder=True)

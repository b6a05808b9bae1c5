"""Redundancy report: use and cost of every block, head, channel and part of a network."""

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
from equiformer2.pruning.analysis.report_figure import PartCost, draw_report
from equiformer2.pruning.calibration import unlabelled
from equiformer2.pruning.cost.operations import MacCount, count_macs
from equiformer2.pruning.structured.importance import (
    UNITS,
    Importance,
    gradient_importances,
    labelled,
    magnitude_importance,
    probe,
)
from equiformer2.script import header

RECORD = "report.json"
"""File that is written last: a folder without it holds an unfinished report."""


@dataclass(frozen=True)
class RedundancyReport:
    """Use and cost of the parts of a network, as plain numbers.

    Attributes:
        source: files, weights, backend, numbers of structures, atoms and edges.
        statistics: statistics per block and tag.
        importance: importance of units by method (`michel`, `taylor`, `magnitude`).
        parts: costs of the parts of a forward pass over the first batch.
        savings: savings of inference, measured on the first batch.
    """

    source: Mapping[str, Any]
    statistics: Sequence[BlockStatistics]
    importance: Mapping[str, Importance]
    parts: Sequence[PartCost]
    savings: Sequence[Saving]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "source": dict(self.source),
            "blocks": [dataclasses.asdict(row) for row in self.statistics],
            "importance": {method: values.to_dict() for method, values in self.importance.items()},
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "lossless": [saving.to_dict() for saving in self.savings],
        }

    def write(self, folder: AnyPath) -> list[Path]:
        """Write tables as CSV, the figure, and last everything as JSON.

        Args:
            folder: folder to write to; it is made if it does not exist.

        Returns:
            Paths of the files.
        """
        folder = Path(folder)
        tables = {
            "blocks.csv": self._block_rows(),
            "units.csv": self._unit_rows(),
            "parts.csv": [dataclasses.asdict(part) for part in self.parts],
            "lossless.csv": self._saving_rows(),
        }
        written = []
        for name, rows in tables.items():
            text = io.StringIO()
            columns = list(dict.fromkeys(column for row in rows for column in row))
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            written.append(write_bytes(folder / name, text.getvalue().encode(), make_folder=True))
        figure = draw_report(self.statistics, self.importance, self.parts)
        written.append(write_bytes(folder / "report.png", figure))
        record = {**header("prune-report/1", self.source.get("checkpoint")), **self.to_dict()}
        return [*written, write_json(folder / RECORD, record)]

    def _block_rows(self) -> list[dict[str, Any]]:
        """Statistics with a column per degree and head."""
        rows = []
        for row in self.statistics:
            values = dataclasses.asdict(row)
            degrees, heads = values.pop("cosine_by_degree"), values.pop("entropy")
            values |= {f"cosine_l{l}": value for l, value in enumerate(degrees)}
            values |= {f"entropy_head{head}": value for head, value in enumerate(heads)}
            rows.append(values)
        return rows

    def _unit_rows(self) -> list[dict[str, Any]]:
        """Importance with a row per unit and a column per method."""
        blocks = len(self.importance["magnitude"].heads)
        rows: list[dict[str, Any]] = []
        for unit, block in itertools.product(UNITS, range(blocks)):
            columns = {
                method: getattr(values, unit)[block].tolist() for method, values in self.importance.items()
            }
            for index, values in enumerate(zip(*columns.values(), strict=True)):
                row = {"unit": unit, "block": block, "index": index}
                rows.append(row | dict(zip(columns, values, strict=True)))
        return rows

    def _saving_rows(self) -> list[dict[str, Any]]:
        """Savings with a column per quartile of the time."""
        rows = []
        for saving in self.savings:
            values = saving.to_dict()
            latency, edges = values.pop("latency"), values.pop("edges") or {}
            values |= {f"latency_{name}": value for name, value in latency.items()}
            rows.append(values | {"edges_in_force_head": edges.get("force head")})
        return rows


def make_report(
    predictor: Predictor,
    structures: Sequence[Data],
    *,
    batch_size: int = 4,
    objective: Literal["probe", "labels"] = "probe",
    repeats: int = 10,
    seed: int = 0,
    source: Mapping[str, Any] | None = None,
) -> RedundancyReport:
    """Measure use and cost of the parts of a network; progress is shown on a terminal.

    Args:
        predictor: the network as inference runs it.
        structures: at least one; with `energy` and `forces` for the objective `labels`.
        batch_size: structures per forward pass; the first batch is the timed one.
        objective: objective of the importance: `importance.probe` or `importance.labelled`.
        repeats: number of timed passes.
        seed: random seed of the directions of `probe`.
        source: origin of network and structures, for the record.

    Returns:
        The report.

    Raises:
        InputError: no structures, missing labels, a structure that the network cannot take.
    """
    if not structures:
        raise InputError("there are no structures to look at: give at least one")
    if batch_size < 1 or repeats < 1:
        raise InputError(f"batch_size is {batch_size} and repeats is {repeats}: give 1 or more")
    model, normalizers = predictor.model, predictor.checkpoint.normalizers
    if objective == "labels":
        labels = ("energy", "forces") if predictor.has_forces else ("energy",)
        for structure in structures:
            lacking = [name for name in labels if name not in structure]
            if lacking:
                raise InputError(
                    f"structure {structure.sid}/{structure.fid} has no {lacking[0]}: "
                    "use the objective 'probe'"
                )
    chosen = labelled(normalizers) if objective == "labels" else probe(normalizers, seed=seed)
    batches = [
        # Labels are left out: a batch needs the same fields of all structures.
        Batch.from_data_list([unlabelled(one) for one in structures[start : start + batch_size]])
        for start in range(0, len(structures), batch_size)
    ]

    def with_progress(items: Sequence[Any], label: str) -> Any:
        return tqdm(items, desc=label, disable=None, leave=False)

    first = batches[0].clone().to(predictor.device)
    with matmul_precision(predictor.precision, predictor.device):
        statistics = block_statistics(model, with_progress(batches, "features"))
        seconds = time_parts(model, first, repeats)
        savings = measure_savings(model, first, normalizers, repeats)
        edges = len(model.build_graph(first).distances)
    importance = {
        **gradient_importances(model, with_progress(structures, "importance"), chosen),
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
    return RedundancyReport(
        source={**(source or {}), **facts},
        statistics=statistics,
        importance=importance,
        parts=_part_costs(count_macs(model, len(first.pos), edges), seconds),
        savings=savings,
    )


def units_holding(importance: Tensor, share: float = 0.9) -> int:
    """Count the units, the most important ones first, that hold a share of the importance.

    Args:
        importance: `[n]` importance of the units.
        share: share of the sum, from 0 to 1.

    Returns:
        Number of units; 0 if all have none.
    """
    ranked = importance.double().sort(descending=True).values.cumsum(0)
    if not len(ranked) or float(ranked[-1]) == 0:
        return 0
    return int((ranked < share * ranked[-1]).sum()) + 1


def _part_costs(macs: MacCount, seconds: Mapping[str, float]) -> list[PartCost]:
    """Join operations and seconds by part, in the order of a forward pass."""
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

"""Search for the smallest S2 grids that a tolerance allows.

The nonlinearities sample the sphere. A grid that is too coarse aliases: the longitudes in the attention
decide how much the angle of the edge frame shows, the grid of the feed-forward networks how much a rotation
of the structure does. A trained network has learned its own aliasing, so every change of a grid, to a finer
one too, changes its answers. This is measured here, not lossless.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import load_checkpoint, save_checkpoint
from equiformer2.errors import InputError, naming_structures
from equiformer2.files import check_target
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.model.folding import check_plain
from equiformer2.model.grid_resolution import GridResolution
from equiformer2.model.so3.grid import smallest_resolution
from equiformer2.pruning.calibration import UNLABELLED
from equiformer2.pruning.cost.operations import count_macs

Measure = Literal["drift", "rotation"]


@dataclass(frozen=True)
class GridRow:
    """Pair of grids that was tried.

    Attributes:
        resolution: points of both grids.
        drift: change of the outputs against the network as it was: the larger of the mean change of a force
            over the mean force (free atoms), and the mean change of an energy in normalised units.
        rotation: change of its own outputs, measured in the same way, when the structures are rotated.
        macs: operations of a pass over the calibration structures, relative to the network as it was.
    """

    resolution: GridResolution
    drift: float
    rotation: float
    macs: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class GridChoice:
    """Result of `tune_grid`.

    Attributes:
        resolution: points of the chosen grids.
        rows: all pairs that were tried, the network as it was first, and the choice once more at the end.
        tol: largest deviation that was allowed.
        measure: deviation that was measured, `drift` or `rotation`.
    """

    resolution: GridResolution
    rows: tuple[GridRow, ...]
    tol: float
    measure: Measure

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def present_grids(model: EquiformerV2) -> GridResolution:
    """Return both grids of a network, its default ones written out."""
    config = model.config

    def pair(grid: int | tuple[int, int] | None, mmax: int) -> tuple[int, int]:
        grid = smallest_resolution(config.lmax, mmax) if grid is None else grid
        return (grid, grid) if isinstance(grid, int) else grid

    return GridResolution(pair(config.attn_grid, config.mmax), pair(config.ffn_grid, config.lmax))


def with_grids(model: EquiformerV2, resolution: GridResolution) -> EquiformerV2:
    """Make a network with the same weights on other grids, in evaluation mode.

    Args:
        model: network to copy; it is left as it is.
        resolution: points of both grids.

    Returns:
        The copy, on the device, in the precision and with the backend of `model`.

    Raises:
        InputError: a grid cannot hold the degrees and orders of the network, or weights are parametrized.
    """
    check_plain(model, "a choice of grids")
    weight = model.sphere_embedding.weight
    config = dataclasses.replace(model.config, grid_resolution=resolution)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away
        other = EquiformerV2(config)
    other.load_state_dict(model.state_dict())
    other.backend = model.backend
    return other.to(device=weight.device, dtype=weight.dtype).eval()


def tune_grid(
    model: EquiformerV2,
    structures: Sequence[Data],
    tol: float,
    *,
    measure: Measure = "drift",
    batch_size: int = 4,
    seed: int = 0,
    progress: Callable[[GridRow], None] | None = None,
) -> GridChoice:
    """Find the smallest grids whose measured deviation stays below `tol`.

    For each module, attention first, fewer longitudes are tried and then fewer latitudes. Every trial is
    measured with the other module's grid as chosen so far: the deviation of the choice is that of both.

    Args:
        model: network whose outputs are to stay; it is left as it is.
        structures: at least one, with forces that are not zero (unlabelled).
        tol: largest deviation, a pure number (see `GridRow`).
        measure: `drift`: outputs stay those of `model`, and no grid is made larger. `rotation`: outputs turn
            with the structures; grids may also become finer than they are, and outputs drift.
        batch_size: structures per forward pass.
        seed: random seed of the rotations.
        progress: called with every row as it is measured.

    Returns:
        The chosen grids and all that were tried.

    Raises:
        InputError: no structures, a tolerance that is not positive, or one that fine grids do not reach.
    """
    if not structures:
        raise InputError("there are no structures to tune the grids on: give at least one")
    if not tol > 0:
        raise InputError(f"tol is {tol}: give a positive deviation")
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}: give at least 1 structure")
    trials = _Trials(model, structures, batch_size, seed, progress)
    start = present_grids(model)
    trials.measured(start)
    config = model.config
    best = start
    if measure == "rotation":
        # Twice as many latitudes, and an odd number of longitudes of at least twice as many.
        finer = [(2 * latitudes, 2 * longitudes + 1) for latitudes, longitudes in (start.attn, start.ffn)]
        best = GridResolution(*finer)

    def deviation(resolution: GridResolution) -> float:
        return float(getattr(trials.measured(resolution), measure))

    if measure == "rotation" and deviation(best) >= tol:
        raise InputError(
            f"with grids of {best.attn} and {best.ffn} points the rotation error is {deviation(best):.1e}: "
            f"give a tolerance above that instead of {tol:g}"
        )
    used = {"attn": not config.use_gate_act, "ffn": config.use_grid_mlp or not config.use_gate_act}
    for name, order in (("attn", config.mmax), ("ffn", config.lmax)):
        if not used[name]:
            best = dataclasses.replace(best, **{name: getattr(start, name)})
            continue
        latitudes, longitudes = getattr(best, name)
        # An odd number of longitudes resolves one order more than the even one below it.
        step = 1 if measure == "drift" else 2
        for fewer in range(2 * order + 1, longitudes, step):
            trial = dataclasses.replace(best, **{name: (latitudes, fewer)})
            if deviation(trial) < tol:
                best, longitudes = trial, fewer
                break
        for fewer in range(2 * (config.lmax + 1), latitudes, 2):
            trial = dataclasses.replace(best, **{name: (fewer, longitudes)})
            if deviation(trial) < tol:
                best = trial
                break
    return GridChoice(best, (*trials.rows, trials.measured(best)), tol, measure)


class _Trials:
    """Measures pairs of grids, each once."""

    def __init__(
        self,
        model: EquiformerV2,
        structures: Sequence[Data],
        batch_size: int,
        seed: int,
        progress: Callable[[GridRow], None] | None,
    ) -> None:
        self.model, self.progress = model, progress
        self.rows: list[GridRow] = []
        generator = torch.Generator().manual_seed(seed)

        def rotation() -> Tensor:
            """Random proper rotation `[3, 3]` float64."""
            q, r = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
            q = q * torch.sign(torch.diagonal(r))
            return q * torch.linalg.det(q)

        device, dtype = model.sphere_embedding.weight.device, model.sphere_embedding.weight.dtype
        self.batches: list[tuple[Batch, RadiusGraph, RadiusGraph, Tensor]] = []
        self.atoms, self.edges = 0, 0
        for first in range(0, len(structures), batch_size):
            chosen = structures[first : first + batch_size]
            alike = [Data(**{name: one[name] for name in UNLABELLED if name in one}) for one in chosen]
            batch = Batch.from_data_list(alike).to(device)
            turns = torch.stack([rotation() for _ in chosen]).to(device, dtype)[batch.batch]
            with naming_structures(batch):
                graph = model.build_graph(batch).in_precision(dtype)
            # Which of equally distant neighbours are kept may change with a rotation: the edges are turned.
            vectors = torch.einsum("eij,ej->ei", turns[graph.edge_index[1]], graph.vectors)
            turned = dataclasses.replace(graph, vectors=vectors)
            self.atoms += len(batch.pos)
            self.edges += len(graph.distances)
            self.batches.append((batch, graph, turned, turns))
        self.before = self._answers(model)
        self.macs = count_macs(model, self.atoms, self.edges).total

    def measured(self, resolution: GridResolution) -> GridRow:
        """The row of these grids, measured at the first call."""
        for row in self.rows:
            if row.resolution == resolution:
                return row
        model = with_grids(self.model, resolution) if self.rows else self.model
        answers = self._answers(model) if self.rows else self.before
        row = GridRow(
            resolution,
            drift=self._deviation([(a, b) for (a, _), (b, _) in zip(answers, self.before, strict=True)]),
            rotation=self._deviation([(turned, plain) for plain, turned in answers]),
            macs=count_macs(model, self.atoms, self.edges).total / self.macs,
        )
        self.rows.append(row)
        if self.progress is not None:
            self.progress(row)
        return row

    @torch.no_grad()
    def _answers(self, model: EquiformerV2) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Per batch outputs of the structures, and of the rotated ones turned back; forces of free atoms."""
        answers = []
        for batch, graph, turned, turns in self.batches:
            plain, rotated = dict(model(batch, graph=graph)), dict(model(batch, graph=turned))
            if "forces" in plain:
                back = torch.einsum("nji,nj->ni", turns.to(plain["forces"]), rotated["forces"])
                free = ~batch.fixed.bool() if "fixed" in batch else slice(None)
                plain["forces"], rotated["forces"] = plain["forces"][free], back[free]
            answers.append((plain, rotated))
        return answers

    @staticmethod
    def _deviation(pairs: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> float:
        """The larger of the relative change of forces and the mean change of an energy, over all batches."""
        changed = torch.cat([a["energy"] - b["energy"] for a, b in pairs]).abs().double().mean()
        forces = [(a["forces"] - b["forces"], b["forces"]) for a, b in pairs if "forces" in b]
        moved = sum(float(change.norm(dim=1).double().sum()) for change, _ in forces)
        length = sum(float(force.norm(dim=1).double().sum()) for _, force in forces)
        relative = moved / length if length else 0.0
        return max(float(changed), relative) if math.isfinite(relative) else math.inf


def write_with_grids(
    source: str | Path, energy_kind: str | None, choice: GridChoice, out: str | Path
) -> None:
    """Write a checkpoint with the chosen grids and all the weights (raw, averaged) of another one.

    Args:
        source: checkpoint of the network that was tuned.
        energy_kind: kind of energy of a checkpoint that does not state its own.
        choice: result of `tune_grid`.
        out: checkpoint to write.

    Raises:
        InputError: `source` cannot be read, or does not state its kind of energy and `energy_kind` is None;
            or `out` is `source`.
        OSError: `out` cannot be written.
    """
    check_target(out, inputs=[source])
    loaded = load_checkpoint(source, energy_kind=energy_kind)
    states = {
        kind: load_checkpoint(source, kind, energy_kind).model.state_dict()
        for kind in loaded.available_weights
    }
    save_checkpoint(
        out,
        model=with_grids(loaded.model, choice.resolution),
        raw_state=states.get("raw"),
        averaged_state=states.get("averaged"),
        normalizers=loaded.normalizers,
        energy_kind=loaded.energy_kind,
        provenance={**loaded.provenance, "grids_tuned": {"measure": choice.measure, "tol": choice.tol}},
    )

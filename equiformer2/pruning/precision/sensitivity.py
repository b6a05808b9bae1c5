"""Sensitivity of the parts of a network to their precision: measured, and by mutual information.

A part is a group of matrices that get one precision (`plan.parts_of`). Measured: the loss against the dense
network on calibration structures (`calibration.Discrepancy`) with this part alone in a lower precision. By
mutual information, as QPruner (arXiv 2412.11629) ranks layers: how much the invariant outputs of the branch
that holds the part tell about the energy and about the forces.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from equiformer2.batch_threads import map_batches
from equiformer2.model import EquiformerV2
from equiformer2.model.routing import Prefix
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.precision.compact import as_rounded
from equiformer2.pruning.stored_passes import StoredPasses

LOWER = ("bf16", "int8", "int4")
"""Precisions below float32, best first."""
#: Steps of the numbers over the largest of a row: half a step is rounded away at most.
_STEPS = {"bf16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}
_BINS = 8
_SHUFFLES = 3


class RoundedTrials:
    """Losses of one network with some of its matrices rounded, on the first calibration batches.

    Args:
        calibration: structures with the answers of the dense network.
        model: the network, in evaluation mode; it has its weights back after every trial.
        structures: number of calibration structures to use, at least; None for all.
    """

    def __init__(self, calibration: Calibration, model: EquiformerV2, structures: int | None = None) -> None:
        self.calibration, self.model = calibration, model
        self.batches: list[int] = []
        held = 0
        for index, (size, _, _) in enumerate(calibration.sizes):
            if structures is not None and held >= structures:
                break
            self.batches.append(index)
            held += size
        self._passes = StoredPasses(model.config, [calibration.sizes[index] for index in self.batches])

    def store_passes(self) -> None:
        """Run the network as it is once, so that trials of later blocks begin there."""
        if not self._passes.blocks or self.model.backend == "compile":
            return
        for index in self.batches:
            known: list[Prefix] = []
            self.calibration.answer(index, self.model, keep=known.append)
            self._passes.put(index, known)

    def loss(self, precisions: Mapping[str, str]) -> float:
        """Return the loss with some matrices rounded, eV.

        Args:
            precisions: module's name -> precision; others are as they are.
        """
        first = min((self._block_of(name) for name in precisions), default=0)
        start = None if first < 0 else first

        def run(index: int) -> Tensor:
            known = self._passes.before(index, start)
            given = {} if known is None else {"start": known}
            return self.calibration.errors(index, self.model, **given)

        device = self.calibration.batches[0].pos.device
        with self.changed(precisions):
            rows = list(map_batches(run, self.batches, count=len(self.batches), device=device))
        return self.calibration.loss_on(self.batches, dict(zip(self.batches, rows, strict=True)))

    def changed(self, precisions: Mapping[str, str]) -> AbstractContextManager[None]:
        """Context in which the network is that of a trial."""
        return as_rounded(self.model, precisions)

    def _block_of(self, module: str) -> int:
        """First block that a change of a module reaches; -1 where all are."""
        head, _, rest = module.partition(".")
        if head == "blocks":
            return int(rest.partition(".")[0])
        return len(self.model.blocks) if head in ("energy_block", "force_block") else -1


def measure_sensitivity(
    trials: RoundedTrials,
    parts: Mapping[str, Sequence[str]],
    known: Mapping[str, Mapping[str, float]] | None = None,
    done: Callable[[str, str, float], None] | None = None,
    lower: Sequence[str] = LOWER,
    end: float = math.inf,
) -> dict[str, dict[str, float]]:
    """Measure the loss with one part at a time in each lower precision.

    Args:
        trials: what runs the network.
        parts: part -> its modules.
        known: results of an earlier call, which are not measured again.
        done: called with part, precision and loss of every new measurement.
        lower: the precisions to measure, best first. The last one, which tells most, is measured first.
        end: time after which none is begun, s of `time.monotonic`; what is left is estimated.

    Returns:
        Part -> precision -> loss, eV; 0 for float32.
    """
    losses = {part: {"float32": 0.0, **(known or {}).get(part, {})} for part in parts}
    if any(precision not in found for found in losses.values() for precision in lower):
        trials.store_passes()
    for precision in reversed(lower):
        for part, modules in parts.items():
            if precision in losses[part]:
                continue
            if time.monotonic() > end:
                return estimated(losses, lower)
            loss = losses[part][precision] = trials.loss(dict.fromkeys(modules, precision))
            if done is not None:
                done(part, precision, loss)
    return losses


def estimated(
    losses: Mapping[str, Mapping[str, float]], lower: Sequence[str] = LOWER
) -> dict[str, dict[str, float]]:
    """Fill in losses that were not measured: the median of the other parts', or by the size of the steps.

    Args:
        losses: part -> precision -> loss, without some.
        lower: the precisions that every part is to have.

    Returns:
        All losses.
    """
    medians: dict[str, float] = {}
    for precision in reversed(lower):
        known = [row[precision] for row in losses.values() if precision in row]
        if known:
            medians[precision] = float(np.median(known))
        elif medians:
            coarser, loss = next(reversed(medians.items()))
            medians[precision] = loss * _STEPS[precision] / _STEPS[coarser]
        else:
            medians[precision] = _STEPS[precision]
    return {part: {**medians, **row} for part, row in losses.items()}


def mutual_information(
    calibration: Calibration, model: EquiformerV2, parts: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Estimate the information that the outputs of each part's branch hold about energy and forces.

    Every channel of degree 0 of the branch's output is binned by its quantiles over all atoms, and so are
    the energy per atom of the atom's structure and the length of its force, both of the dense network. The
    result is the mean over channels and both targets; what shuffled channels give by chance is subtracted.

    Args:
        calibration: structures with the answers of the dense network.
        model: the dense network, in evaluation mode.
        parts: part -> its modules.

    Returns:
        Part -> information, bits. Parts of one branch share theirs. The heads, whose outputs are the targets
        themselves, have the largest of all.
    """
    found: dict[str, list[Tensor]] = {}
    targets: list[np.ndarray] = []
    with torch.no_grad(), _observed(model, found):
        for index, batch in enumerate(calibration.batches):
            answer = calibration.answer(index, model)
            energy = (answer["energy"] / batch.natoms.view(-1))[batch.batch]
            forces = answer["forces"].norm(dim=1) if "forces" in answer else energy
            targets.append(torch.stack((energy, forces), 1).cpu().double().numpy())
    binned = [_by_quantiles(column) for column in np.concatenate(targets).T]
    rng = np.random.default_rng(0)
    by_branch: dict[str, float] = {}
    for branch, outputs in found.items():
        channels = [_by_quantiles(column) for column in torch.cat(outputs).cpu().double().numpy().T]
        by_branch[branch] = float(np.mean([_above_chance(c, t, rng) for c in channels for t in binned]))
    most = max(by_branch.values(), default=0.0)
    return {
        part: next((bits for branch, bits in by_branch.items() if part.startswith(branch)), most)
        for part in parts
    }


@contextmanager
def _observed(model: EquiformerV2, found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Context in which the outputs `[N, C]` of degree 0 of every branch are collected by its name."""
    branches: dict[str, nn.Module] = {"edge_degree_embedding": model.edge_degree_embedding}
    for number, block in enumerate(model.blocks):
        for name in ("ga", "ffn"):
            branch = getattr(block, name, None)
            if isinstance(branch, nn.Module):
                branches[f"blocks.{number}.{name}"] = branch

    def collect(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            messages = output if isinstance(output, Tensor) else output.messages  # type: ignore[attr-defined]
            found.setdefault(name, []).append(messages[:, 0].detach())

        return hook

    hooks = [module.register_forward_hook(collect(name)) for name, module in branches.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _by_quantiles(values: np.ndarray) -> np.ndarray:
    """Number of the bin of every value; equal values share one."""
    edges = np.quantile(values, np.linspace(0, 1, _BINS + 1)[1:-1])
    return np.searchsorted(edges, values, side="right")


def _information(first: np.ndarray, second: np.ndarray) -> float:
    """Mutual information of two lists of bins, bits."""
    table = np.zeros((_BINS, _BINS))
    np.add.at(table, (first, second), 1.0 / len(first))
    apart = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    there = table > 0
    return float((table[there] * np.log2(table[there] / apart[there])).sum())


def _above_chance(channel: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> float:
    chance = np.mean([_information(rng.permutation(channel), target) for _ in range(_SHUFFLES)])
    return max(0.0, _information(channel, target) - float(chance))

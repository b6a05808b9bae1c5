"""Low-rank maps that take back a part of what rounding changes, to start a recovery from (LoftQ).

A stored matrix Q and a low-rank map L stand for the matrix W of the float32 network. LoftQ (Li et al. 2023,
arXiv 2310.08659) alternates: Q rounds W - L, and L is the best map of its rank for W - Q. The first step
alone, with L = 0, is the map of the plain rounding error. Of all steps the one with the least error is taken.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datasets_oc20.untrusted import AnyPath
from equiformer2.adapters import AdapterSettings
from equiformer2.checkpoint import Checkpoint
from equiformer2.checkpoint.adapter_files import Adapter, Base, write_adapter
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.model import EquiformerV2
from equiformer2.model.parametrizations import LowRank, rounded
from equiformer2.pruning.precision.compact import compact_network
from equiformer2.pruning.precision.plan import PrecisionPlan
from equiformer2.pruning.structured.apply import shrink

_STEPS = 5
"""Alternations, as in LoftQ."""
_KINDS = ("int8", "int4")
_PER_MAP = 150
"""Bytes that a map takes in a file beside its numbers, at most: name, shape, rank and scale."""
_OVERHEAD = 30_000
"""Bytes of everything else in an adapter file, at most."""


@dataclass(frozen=True)
class Recovery:
    """Network of a plan with the maps that belong to it.

    Attributes:
        network: with its stored matrices, which differ from those of the plan alone.
        maps: by the names of the weights.
        error: root of the summed squares of W - Q - L over that of W, over all matrices with a map.
        plain_error: the same of W - Q, with the matrices of the plan alone.
    """

    network: EquiformerV2
    maps: Mapping[str, LowRank]
    error: float
    plain_error: float


def is_recoverable(plan: PrecisionPlan) -> bool:
    """Tell whether a plan stores matrices as integers, whose rounding maps can take back in part."""
    return any(precision in _KINDS for _, precision in plan.modules)


def recover(model: EquiformerV2, plan: PrecisionPlan, rank: int) -> Recovery:
    """Make the network of a plan and the maps that bring it nearest to the unrounded one.

    Args:
        model: dense network with plain weights; it is left as it is.
        plan: its precisions and pruning; some matrices are stored as integers (`is_recoverable`).
        rank: of the maps, at least 1; matrices that are narrower get their width.

    Raises:
        InputError: as `compact_network`.
    """
    plan = plan.checked(model.config)
    small = model if plan.pruning is None else shrink(model, plan.pruning)
    maps, weights = {}, {}
    total = error = plain_error = 0.0
    for name, precision in plan.modules:
        if precision not in _KINDS:
            continue
        weight = small.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
        if min(weight.shape[-2:]) < 2:
            continue
        found = _alternate(weight, precision, min(rank, *weight.shape[-2:]))
        weights[name], maps[f"{name}.weight"] = found.to_round, found.map
        total += float(weight.double().square().sum())
        error += found.error
        plain_error += float((weight - rounded(weight, precision)).double().square().sum())
    network = compact_network(_with_weights(small, weights), dataclasses.replace(plan, pruning=None))
    total = total or 1.0  # of no matrix, or of zeros alone, nothing is rounded away
    return Recovery(network, maps, (error / total) ** 0.5, (plain_error / total) ** 0.5)


@dataclass(frozen=True)
class _Split:
    """Matrix to round and map beside it, with the sum of the squares of what both leave out."""

    to_round: Tensor
    map: LowRank
    error: float


def _alternate(weight: Tensor, precision: str, rank: int) -> _Split:
    rest = weight
    best: _Split | None = None
    for _ in range(_STEPS):
        to_round = rest
        stored = rounded(to_round, precision)
        left, right = _best_of_rank(weight - stored, rank)
        product = left @ right
        error = float((weight - stored - product).double().square().sum())
        if best is None or error < best.error:
            best = _Split(to_round, LowRank(left, right, 1.0), error)
        rest = weight - product
    assert best is not None
    return best


def _best_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors `[..., out, rank]` and `[..., rank, in]` of the nearest product, of equal size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the subspace that is refined begins at random
        more = min(rank + 8, *matrix.shape[-2:])
        u, s, v = torch.svd_lowrank(matrix.float().cpu(), q=more, niter=4)
    root = s[..., :rank].sqrt().unsqueeze(-2)
    left, right = u[..., :rank] * root, (v[..., :rank] * root).transpose(-2, -1)
    return left.to(matrix).contiguous(), right.to(matrix).contiguous()


@torch.no_grad()
def _with_weights(model: EquiformerV2, weights: Mapping[str, Tensor]) -> EquiformerV2:
    """Copy a network with some of its matrices replaced, by their modules' names."""
    changed = copy.deepcopy(model)
    for name, weight in weights.items():
        changed.get_submodule(name).weight.copy_(weight)  # type: ignore[union-attr, operator]
    return changed


def write_start(path: AnyPath, found: Recovery, checkpoint: Checkpoint, base: AnyPath, rank: int) -> Adapter:
    """Write the maps as an adapter of the compact checkpoint, for use beside it and to train further.

    Args:
        path: the adapter file.
        found: as `recover` makes it.
        checkpoint: where the network comes from.
        base: file of the compact checkpoint, which has been written.
        rank: that was asked for.
    """
    adapter = Adapter(
        source=str(path),
        base=Base(fingerprint_of_weights(found.network), sha256(base), Path(base).name, checkpoint.weights),
        settings={**AdapterSettings(rank=rank, keep=1.0, scale=1.0).to_dict(), "origin": "rounding error"},
        maps=found.maps,
        replaced={},
        normalizers=checkpoint.normalizers,
        energy_kind=checkpoint.energy_kind,
        provenance={"recovers": checkpoint.provenance},
    )
    write_adapter(path, adapter)
    return adapter


def adapter_bytes(shapes: Mapping[str, tuple[int, ...]], rank: int) -> int:
    """Count the bytes of the file of maps on all matrices, at most.

    Args:
        shapes: module -> shape of its matrix.
        rank: of the maps.
    """
    numbers = 0
    for *stack, rows, columns in shapes.values():
        numbers += torch.Size(stack).numel() * min(rank, rows, columns) * (rows + columns)
    return _OVERHEAD + 4 * numbers + numbers // 8 + _PER_MAP * len(shapes)

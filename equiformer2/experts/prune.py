"""Keep the experts that a task needs, tell what that changes at most, and measure it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from equiformer2.checkpoint.expert_files import ExpertContents, TaskInfo, with_experts, with_tasks
from equiformer2.errors import InputError, naming_structures
from equiformer2.experts import scores
from equiformer2.experts.composition import composition_of
from equiformer2.experts.dropped import KEY, DroppedExperts
from equiformer2.experts.network import ExpertNetwork
from equiformer2.experts.outputs import expert_outputs

_FIELDS = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "fixed", "sid", "fid")


@dataclass(frozen=True)
class PruneSettings:
    """Choice of the experts that stay.

    Args:
        keep: share of the experts.
        method: scores the experts (`experts.scores`).
        top: k, number of leading experts of a system that count; None for a quarter of all, and at least 1.
        seed: of random scores.
        batch_size: structures per forward pass.

    Raises:
        InputError: a value is out of its range.
    """

    keep: float = 0.5
    method: scores.Method = "tcess"
    top: int | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.method not in scores.METHODS:
            raise InputError(f"experts are scored by {', '.join(scores.METHODS)}, not by {self.method!r}")
        if self.batch_size < 1:
            raise InputError(f"the number of structures per batch is {self.batch_size}: give at least 1")

    def leading(self, count: int) -> int:
        """Return k for a mixture of `count` experts."""
        return max(1, count // 4) if self.top is None else self.top


def task_structures(info: TaskInfo, given: Sequence[Data] = ()) -> list[Data]:
    """Choose the structures that stand for a task: the given ones, else those that its file holds."""
    if given:
        return list(given)
    return [] if info.samples is None else info.samples.structures()


def task_compositions(info: TaskInfo, structures: Sequence[Data]) -> Tensor:
    """Compute the compositions `[systems, Z]` of structures; without any, the task's mean composition.

    Raises:
        InputError: the network does not know an element, naming the structure.
    """
    if not structures:
        return info.composition[None]
    return torch.cat([_composition(structure, len(info.composition)) for structure in structures])


def _composition(structure: Data, num_elements: int) -> Tensor:
    try:
        return composition_of(structure, num_elements)
    except InputError as error:
        raise InputError(f"structure {structure.sid}/{structure.fid} (sid/fid): {error}") from error


def prune_experts(
    contents: ExpertContents,
    task: str,
    settings: PruneSettings,
    given: Sequence[Data] = (),
    weights: str | None = None,
    progress: bool = False,
) -> tuple[ExpertContents, dict[str, Any]]:
    """Choose the experts that stay for a task, and describe the change.

    Args:
        contents: of a file with all its experts.
        task: the result answers for it alone.
        settings: of the choice.
        given: structures of the task; without them those that the file holds, or else its mean composition.
        weights: `raw` or `averaged` ones to judge by; None for averaged ones where the file has them.
        progress: show a bar.

    Returns:
        Contents of the smaller file, and plain values: `tcess` of all experts, `scores` (those of the
        method), `kept` (numbers in the file's order), `bound` (of the norm of the change of all weights
        together, the largest over the structures), `bound_relative` and `bounds_relative` (to the norm of
        the weights; of every weight), `weight_change` and `weight_change_relative` (the same as they are),
        `kept_share` (smallest sum of the coefficients that stay), `measured_change_eV_A` (mean absolute
        change of the force components of free atoms), `measured_change_eV`, `force_mae_eV_A`,
        `force_mae_full_eV_A` and `force_mae_ratio` (on labels); None for what there is nothing to measure on.

    Raises:
        InputError: an unknown task, a share that keeps none or all, or a structure that the network cannot
            take.
    """
    info = contents.task(task)
    network = ExpertNetwork.from_contents(contents, weights)
    count = network.settings.num_experts
    number, top = scores.number_kept(settings.keep, count), settings.leading(count)
    structures = task_structures(info, given)
    compositions = task_compositions(info, structures)
    with torch.no_grad():
        tasks = torch.full((len(compositions),), network.task_number(task))
        coefficients = network.gate.coefficients(compositions, tasks).double()
    importance = {"tcess": scores.tcess(coefficients, top)}
    if settings.method == "frequency":
        importance["frequency"] = scores.usage_frequency(coefficients, top)
    elif settings.method == "random":
        importance["random"] = scores.random_scores(count, settings.seed)
    elif settings.method == "reap":
        outputs = expert_outputs(network, structures, task)
        importance["reap"] = scores.reap(outputs, coefficients, top)
    kept = scores.highest(importance[settings.method], number)
    record: dict[str, Any] = {
        "task": task,
        "num_experts": count,
        "method": settings.method,
        "top": top,
        "tcess": importance["tcess"].tolist(),
        "scores": importance[settings.method].tolist(),
        "kept": list(kept),
        "systems": len(compositions),
        **_bounds(network, coefficients, kept),
    }
    dropped = DroppedExperts.of(network, kept, record["bound"])
    smaller = with_tasks(with_experts(contents, kept), [task])
    earlier = contents.provenance.get(KEY)
    stage = {**record, **dropped.to_dict(), "file": contents.source, "earlier": earlier}
    smaller = replace(smaller, provenance={**contents.provenance, KEY: stage})
    pruned = ExpertNetwork.from_contents(smaller, weights)
    bar = tqdm(total=len(structures), desc="structures", unit="structure", disable=not progress)
    with bar:
        record |= measured_change(network, pruned, structures, info, settings.batch_size, bar.update)
    return smaller, record


def _bounds(network: ExpertNetwork, coefficients: Tensor, kept: Sequence[int]) -> dict[str, Any]:
    """Bounds of the change of weights, and the change itself, largest over the systems."""
    stacks = network.expert_weights()
    norms = scores.expert_norms(stacks)
    bounds = scores.change_bound(coefficients, norms, kept)
    changes = scores.weight_change(coefficients, stacks, kept)
    sizes = scores.merged_norms(coefficients, stacks)
    # Of all weights together, as of one long vector.
    whole, moved, size = (each.norm(dim=1) for each in (bounds, changes, sizes))
    relative = (bounds / sizes.clamp(min=1e-30)).amax(0).tolist()
    return {
        "bound": float(whole.max()),
        "bound_relative": float((whole / size.clamp(min=1e-30)).max()),
        "bounds_relative": dict(zip(stacks, relative, strict=True)),
        "weight_change": float(moved.max()),
        "weight_change_relative": float((moved / size.clamp(min=1e-30)).max()),
        "kept_share": float(coefficients[:, list(kept)].sum(1).min()),
    }


def measured_change(
    full: ExpertNetwork,
    pruned: ExpertNetwork,
    structures: Sequence[Data],
    info: TaskInfo,
    batch_size: int = 8,
    done: Any = None,
) -> dict[str, float | None]:
    """Measure how much the answers for a task change.

    Args:
        full, pruned: networks that know the task.
        structures: with `forces` in eV/Å where errors against labels are wanted.
        info: of the task.
        batch_size: structures per forward pass.
        done: called with the number of structures after every batch.

    Returns:
        See `prune_experts`.
    """
    sums: dict[str, list[Tensor]] = {}
    for start in range(0, len(structures), batch_size):
        some = structures[start : start + batch_size]
        batch = Batch.from_data_list([Data(**{name: each[name] for name in _FIELDS}) for each in some])
        with torch.no_grad(), naming_structures(batch):
            before, after = (
                info.normalizers.denormalize(network(batch, info.name), batch) for network in (full, pruned)
            )
        sums.setdefault("energy", []).append((after["energy"] - before["energy"]).abs())
        if "forces" in after:
            free = ~batch.fixed.bool()
            old, new = (out["forces"][free].double() for out in (before, after))
            sums.setdefault("forces", []).append((new - old).abs().flatten())
            if all("forces" in each for each in some):
                labels = torch.cat([each.forces for each in some])[free].double()
                sums.setdefault("error", []).append((new - labels).abs().flatten())
                sums.setdefault("full", []).append((old - labels).abs().flatten())
        if done is not None:
            done(len(some))

    def mean(name: str) -> float | None:
        values = torch.cat(sums[name]) if name in sums else torch.empty(0)
        return float(values.mean()) if len(values) else None

    error, whole = mean("error"), mean("full")
    return {
        "measured_change_eV_A": mean("forces"),
        "measured_change_eV": mean("energy"),
        "force_mae_eV_A": error,
        "force_mae_full_eV_A": whole,
        "force_mae_ratio": error / whole if error is not None and whole else None,
    }


def foreign_structures(
    contents: ExpertContents, task: str, structures: Sequence[Data], weights: str | None = None
) -> list[dict[str, Any]]:
    """Find structures for which a pruned file is worse than its bound, or that are unlike those of the task.

    Args:
        contents: of a file, pruned or not.
        task: name.
        structures: to judge.
        weights: as in `prune_experts`.

    Returns:
        For each such structure its `sid` and `fid`, and `reasons`: `elements` that no training structure of
        the task has; a composition `far` from those of the file's samples, farther than these are from each
        other; a bound of the change that is larger than the task's.
    """
    info = contents.task(task)
    seen = info.composition > 0
    known = task_compositions(info, task_structures(info))
    dropped = DroppedExperts.from_provenance(contents.provenance, contents.source)
    network = ExpertNetwork.from_contents(contents, weights) if dropped else None
    reach = _reach(known)
    found = []
    for structure in structures:
        composition = _composition(structure, len(info.composition))
        new = (composition[0] > 0) & ~seen
        reasons: dict[str, Any] = {}
        if bool(new.any()):
            reasons["elements"] = new.nonzero().flatten().tolist()
        distance = float(torch.cdist(composition, known).min())
        if reach is not None and distance > reach:
            reasons["distance"], reasons["reach"] = distance, reach
        if dropped is not None and network is not None:
            bound = float(dropped.bounds(network, task, composition)[0])
            if bound > dropped.limit * (1 + 1e-6):
                reasons["bound"], reasons["limit"] = bound, dropped.limit
        if reasons:
            found.append({"sid": structure.sid, "fid": int(structure.fid), **reasons})
    return found


def _reach(known: Tensor) -> float | None:
    """Largest distance of a composition to the nearest other one; None with fewer than two."""
    distinct = known.unique(dim=0)
    if len(distinct) < 2:
        return None
    apart = torch.cdist(distinct, distinct) + torch.diag(torch.full((len(distinct),), math.inf)).double()
    return float(apart.min(1).values.max())


def describe(record: Mapping[str, Any]) -> str:
    """Describe what was kept, and its bound, in two lines."""
    kept = ", ".join(map(str, record["kept"]))
    return (
        f"experts {kept} of {record['num_experts']} stay for {record['task']} ({record['method']}), with at "
        f"least {record['kept_share']:.1%} of the coefficients of {record['systems']} compositions\n"
        f"bound of the change of the weights: {record['bound_relative']:.1%} of their norm "
        f"({record['bound']:.4g}); the change is {record['weight_change_relative']:.1%}"
    )

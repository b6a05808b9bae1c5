"""Keep the experts that a task needs, tell what that changes at most, and measure it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from equiformer2.checkpoint.expert_files import ExpertContents, TaskInfo, with_experts, with_tasks
from equiformer2.errors import InputError, naming_structures
from equiformer2.experts import scores
from equiformer2.experts.composition import composition_of, unseen_elements
from equiformer2.experts.dropped import KEY, DroppedExperts
from equiformer2.experts.network import ExpertNetwork
from equiformer2.experts.outputs import expert_outputs
from equiformer2.values import Optional, Whole, mapping

_FIELDS = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "fixed", "sid", "fid")


@dataclass(frozen=True)
class PruneSettings:
    """Choice of the experts that stay.

    Args:
        keep: share of the experts.
        method: scores the experts (`experts.scores`).
        top: k, number of leading experts of a system that count; None for a quarter of all, and at least 1.
        seed: of random scores.

    Raises:
        InputError: a value is out of its range.
    """

    keep: float = 0.5
    method: scores.Method = "tcess"
    top: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in scores.METHODS:
            raise InputError(f"experts are scored by {', '.join(scores.METHODS)}, not by {self.method!r}")
        Optional(Whole(1, 1 << 30)).read(self.top, "number of leading experts (top)")
        Whole(0, 2**63 - 1).read(self.seed, "seed")

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
) -> tuple[ExpertContents, dict[str, Any]]:
    """Choose the experts that stay for a task, and bound the change of the weights.

    Args:
        contents: of a file with all its experts.
        task: the result answers for it alone.
        settings: of the choice.
        given: structures of the task; without them those that the file holds, or else its mean composition.
        weights: `raw` or `averaged` ones to judge by; None for averaged ones where the file has them.

    Returns:
        Contents of the smaller file, and plain values: `tcess` of all experts, `scores` (those of the
        method), `kept` (numbers in the file's order), `systems` (number of compositions), `bound` (of the
        norm of the change of all weights together, the largest over the structures), `bound_relative` and
        `bounds_relative` (to the norm of the weights; of every weight), `weight_change` and
        `weight_change_relative` (the change itself), `kept_share` (smallest sum of the coefficients that
        stay).

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
    tcess = scores.tcess(coefficients, top)
    if settings.method == "tcess":
        chosen = tcess
    elif settings.method == "frequency":
        chosen = scores.usage_frequency(coefficients, top)
    elif settings.method == "random":
        chosen = scores.random_scores(count, settings.seed)
    else:
        chosen = scores.reap(expert_outputs(network, structures, task), coefficients, top)
    kept = scores.highest(chosen, number, coefficients)
    stacks = network.expert_weights()
    products = scores.expert_products(stacks)
    record: dict[str, Any] = {
        "task": task,
        "num_experts": count,
        "method": settings.method,
        "top": top,
        "tcess": tcess.tolist(),
        "scores": chosen.tolist(),
        "kept": list(kept),
        "systems": len(compositions),
        **_bounds(list(stacks), products, coefficients, kept),
    }
    kind = contents.choose_weights(weights)
    dropped = DroppedExperts.of(network.gate, products, kept, coefficients, kind)
    smaller = with_tasks(with_experts(contents, kept), [task])
    before = mapping(contents.provenance.get(KEY, {}), f"{contents.source}: {KEY}")
    earlier = before.get("earlier")
    # Gates and products of experts of which nothing is left are of no use.
    known = {name: value for name, value in before.items() if name in record or name == "file"}
    stage = {
        **record,
        **dropped.to_dict(),
        "file": Path(contents.source).name,
        "earlier": [*(earlier if isinstance(earlier, list) else []), *([known] if known else [])],
    }
    return replace(smaller, provenance={**contents.provenance, KEY: stage}), record


def _bounds(
    names: Sequence[str], products: Tensor, coefficients: Tensor, kept: Sequence[int]
) -> dict[str, Any]:
    """Bounds of the change of weights, and the change itself, largest over the systems."""
    bounds = scores.change_bound(coefficients, products, kept)
    changes = scores.weight_change(coefficients, products, kept)
    sizes = scores.merged_norms(coefficients, products)
    # Of all weights together, as of one long vector.
    whole, moved, size = (each.norm(dim=1) for each in (bounds, changes, sizes))
    relative = (bounds / sizes.clamp(min=1e-30)).amax(0).tolist()
    return {
        "bound": float(whole.max()),
        "bound_relative": float((whole / size.clamp(min=1e-30)).max()),
        "bounds_relative": dict(zip(names, relative, strict=True)),
        "weight_change": float(moved.max()),
        "weight_change_relative": float((moved / size.clamp(min=1e-30)).max()),
        "kept_share": float(coefficients[:, list(kept)].sum(1).min()),
    }


def measure(
    full: ExpertContents,
    pruned: ExpertContents,
    task: str,
    given: Sequence[Data] = (),
    weights: str | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, float | None]:
    """Measure how much the answers for a task change.

    Args:
        full, pruned: contents of files that know the task.
        task: name.
        given: structures, with `forces` in eV/Å where errors against labels are wanted; without them those
            that the file holds.
        weights: as in `prune_experts`.
        batch_size: structures per forward pass.
        progress: show a bar.

    Returns:
        `measured_change_eV_A` (mean absolute change of the force components of free atoms),
        `measured_change_eV`, `force_mae_eV_A`, `force_mae_full_eV_A` and `force_mae_ratio` (against labels);
        None for what there is nothing to measure on.
    """
    if batch_size < 1:
        raise InputError(f"the number of structures per batch is {batch_size}: give at least 1")
    info = full.task(task)
    structures = task_structures(info, given)
    networks = [ExpertNetwork.from_contents(each, weights) for each in (full, pruned)]
    sums: dict[str, list[Tensor]] = {}
    # Apart, so that every label counts.
    groups = [[each for each in structures if ("forces" in each) == labelled] for labelled in (True, False)]
    batches = [own[at : at + batch_size] for own in groups for at in range(0, len(own), batch_size)]
    for some in tqdm(batches, desc="measure", unit="batch", disable=not progress or not structures):
        batch = Batch.from_data_list([Data(**{name: each[name] for name in _FIELDS}) for each in some])
        with torch.no_grad(), naming_structures(batch):
            before, after = (info.normalizers.denormalize(each(batch, task), batch) for each in networks)
        sums.setdefault("energy", []).append((after["energy"] - before["energy"]).abs())
        if "forces" in after:
            free = ~batch.fixed.bool()
            old, new = (out["forces"][free].double() for out in (before, after))
            sums.setdefault("forces", []).append((new - old).abs().flatten())
            if all("forces" in each for each in some):
                labels = torch.cat([each.forces for each in some])[free].double()
                sums.setdefault("error", []).append((new - labels).abs().flatten())
                sums.setdefault("full", []).append((old - labels).abs().flatten())

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
        For each such structure `sid`, `fid`, a `text`, and what applies: `elements` that no training
        structure of the task has; the `distance` of its composition to those of the file's samples, where
        none of these is as far from the others (`reach`); a `bound` of the change above the task's `limit`.
    """
    info = contents.task(task)
    known = task_compositions(info, task_structures(info))
    distinct, reach = known.unique(dim=0), None
    if len(distinct) > 1:  # largest distance of one to the nearest other
        apart = torch.cdist(distinct, distinct)
        apart.fill_diagonal_(math.inf)
        reach = float(apart.min(1).values.max())
    kind = contents.choose_weights(weights)
    dropped = DroppedExperts.from_provenance(contents.provenance, contents.source, kind)
    network = ExpertNetwork.from_contents(contents, weights) if dropped else None
    found = []
    for structure in structures:
        composition = _composition(structure, len(info.composition))
        reasons: dict[str, Any] = {}
        texts = []
        new = unseen_elements(info, composition[0])
        if new:
            reasons["elements"] = new
            texts.append(f"{', '.join(new)} not among the training data of {task}")
        distance = float(torch.cdist(composition, known).min())
        if reach is not None and distance > reach:
            reasons |= {"distance": distance, "reach": reach}
            texts.append(f"a composition far from those of {task} ({distance:.3f}, theirs {reach:.3f} apart)")
        if dropped is not None and network is not None:
            bound = dropped.excess(network.gate, network.task_number(task), composition[0])
            if bound is not None:
                reasons |= {"bound": bound, "limit": dropped.limit}
                texts.append(
                    f"worse than the bound of {task} ({bound:.4g}, its own at most {dropped.limit:.4g})"
                )
        if texts:
            place = {"sid": structure.sid, "fid": int(structure.fid)}
            found.append({**place, **reasons, "text": "; ".join(texts)})
    return found

"""Ordinary checkpoints made of networks of experts, for one task and composition."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from equiformer2.checkpoint.checkpoint import save_checkpoint
from equiformer2.checkpoint.contents import WeightsKind
from equiformer2.checkpoint.expert_files import TaskInfo, read_experts
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.checkpoint.training_data import inherited
from equiformer2.errors import InputError
from equiformer2.experts.composition import composition_from_formula, shares_by_symbol, unseen_elements
from equiformer2.experts.dropped import DroppedExperts
from equiformer2.experts.network import ExpertNetwork
from equiformer2.experts.scores import renormalized
from equiformer2.model.equiformer import EquiformerV2
from equiformer2.model.parameters import count_parameters


def merge_experts(
    path: str | os.PathLike[str],
    task: str,
    out: str | os.PathLike[str],
    composition: str | None = None,
    weights: str | None = None,
    experts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write an ordinary checkpoint that answers as a network of experts does for one task and composition.

    For other compositions the network of experts would use other coefficients; what the file was made for is
    in its provenance.

    Args:
        path: file of the experts.
        task: name of the task.
        out: native checkpoint to write.
        composition: formula of which the shares of the elements count; None for the mean of the task's
            training structures, which the file holds.
        weights: `raw`, `averaged`, or None for the averaged ones where the file has them.
        experts: numbers of those that are kept, with coefficients that are scaled to add up to 1; None for
            all.

    Returns:
        A summary in plain values, with the coefficients of the kept experts and the elements that no training
        structure of the task has; of a pruned file with `excess_of_bound`, the bound of the change of the
        weights where it is larger than those of the task's structures, else None.

    Raises:
        InputError: as `read_experts`; an unknown task, element or expert.
        OSError: `out` cannot be written.
    """
    if Path(out).resolve() == Path(path).resolve():
        raise InputError(f"{out} is the file of the experts: give another name for the checkpoint")
    contents = read_experts(path)
    info = contents.task(task)
    kind = contents.choose_weights(weights)
    network = ExpertNetwork.from_contents(contents, kind)
    shares = info.composition
    if composition is not None:
        shares = composition_from_formula(composition, contents.config.max_num_elements)
    merged = network.merged(task, shares, experts)
    with torch.no_grad():
        coefficients = network.gate.coefficients(shares[None], torch.tensor([network.task_number(task)]))
    used = list(range(network.settings.num_experts)) if experts is None else [int(each) for each in experts]
    of_experts: dict[str, Any] = {
        "file": Path(path).name,
        "sha256": sha256(path),
        "task": task,
        "composition": shares_by_symbol(shares),
        "composition_from": "mean of the training data" if composition is None else composition,
        "coefficients": renormalized(coefficients, used)[0].tolist(),
        "experts": used,
        "unseen_elements": unseen_elements(info, shares),
    }
    dropped = DroppedExperts.from_provenance(contents.provenance, contents.source, kind)
    if dropped is not None:
        of_experts["excess_of_bound"] = dropped.excess(network.gate, network.task_number(task), shares)
    save_merged(out, merged, info, kind, contents.provenance, of_experts)
    return {
        "out": str(out),
        "weights": kind,
        "parameters": count_parameters(contents.config),
        "energy_kind": info.energy_kind,
        "tasks": list(contents.tasks),
        **of_experts,
    }


def save_merged(
    out: str | os.PathLike[str],
    merged: EquiformerV2,
    info: TaskInfo,
    kind: WeightsKind,
    provenance: Mapping[str, Any],
    of_experts: Mapping[str, Any],
) -> None:
    """Write a merged network as an ordinary checkpoint.

    Args:
        out: native checkpoint to write, in a folder that is made where it is missing.
        merged: the network.
        info: of its task.
        kind: weights that it was merged from.
        provenance: of the file of the experts.
        of_experts: plain values: task, composition and coefficients.

    Raises:
        OSError: `out` cannot be written.
    """
    state = merged.state_dict()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        out,
        model=merged,
        raw_state=state if kind == "raw" else None,
        averaged_state=state if kind == "averaged" else None,
        normalizers=info.normalizers,
        energy_kind=info.energy_kind,
        provenance={
            **inherited(info.provenance),
            **validation_of(provenance, info.name),
            "merged_from": dict(of_experts),
        },
    )


def validation_of(provenance: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Select the errors of a task in the last validation, as the provenance of a checkpoint holds them."""
    values = provenance.get("validation")
    if not isinstance(values, dict):
        return {}
    own = {
        name.removeprefix(f"{task}/"): value for name, value in values.items() if name.startswith(f"{task}/")
    }
    kept: dict[str, Any] = {name: provenance[name] for name in ("step", "epoch") if name in provenance}
    return {"validation": own, **kept} if own else kept

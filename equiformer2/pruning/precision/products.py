"""Branches that multiply in bfloat16: what they save on this machine, and what they change.

Storing weights in fewer bits saves no time: products run in float32. On a device with instructions for
products of bfloat16 numbers, whole branches can run as under autocast (`model.branches`), and a limit of time
is met by choosing branches, besides pruning.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.kernels.linear import multiplies_bfloat16
from equiformer2.model import EquiformerV2
from equiformer2.model.branches import KINDS, branch_names, set_bf16_branches
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.precision.allocation import PartSizes
from equiformer2.pruning.precision.compact import as_rounded
from equiformer2.pruning.precision.plan import matrices
from equiformer2.pruning.precision.sensitivity import RoundedTrials
from equiformer2.values import Number, mapping

_UNIT = 1_000_000_000
"""Costs are whole numbers: billionths of the time of the dense network."""


def folded(model: EquiformerV2) -> EquiformerV2:
    """Copy a network and prepare it for inference."""
    network = copy.deepcopy(model).requires_grad_(False)
    network.fold_weights()
    return network


def can_save_time(model: EquiformerV2) -> bool:
    """Tell whether branches of a network could be faster in bfloat16 where it is."""
    # Gradients of the energy are taken in float32.
    return model.config.forces != "gradient" and multiplies_bfloat16(model.sphere_embedding.weight.device)


@contextmanager
def in_bf16(model: EquiformerV2, branches: Collection[str]) -> Iterator[None]:
    """Context in which branches multiply in bfloat16, with the weights that a plan stores for it.

    Args:
        model: a folded network with plain weights; it is as before afterwards.
        branches: names of branches.
    """
    names = [name for name in matrices(model) if any(name.startswith(f"{b}.") for b in branches)]
    with as_rounded(model, dict.fromkeys(names, "bf16")):
        set_bf16_branches(model, branches)
        model.fold_weights()
        try:
            yield
        finally:
            set_bf16_branches(model, ())
            model.fold_weights()


class ProductTrials(RoundedTrials):
    """Losses of one folded network with some of its branches in bfloat16, by the branches' names."""

    def changed(self, precisions: Mapping[str, str]) -> AbstractContextManager[None]:
        """Context in which the branches that are `bf16` multiply so."""
        return in_bf16(self.model, [name for name, precision in precisions.items() if precision == "bf16"])


@dataclass(frozen=True)
class Timing:
    """Measured time of a network over that of the dense one.

    Attributes:
        ratio: with all products in float32.
        savings: kind of branch -> share of the dense network's time that each branch of this kind saves in
            bfloat16; without kinds that save nothing.
    """

    ratio: float
    savings: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def read(value: object, name: str) -> Timing:
        """Check a stored timing; a `values.Rule`."""
        values = mapping(value, name)
        if set(values) != {"ratio", "savings"}:
            raise InputError(f"{name} must hold ratio and savings")
        savings = mapping(values["savings"], f"{name}.savings")
        if not set(savings) <= set(KINDS):
            raise InputError(f"{name}.savings hold an unknown kind of branch")
        rule = Number(0, 1e6)
        return Timing(
            rule.read(values["ratio"], f"{name}.ratio"),
            {kind: rule.read(saved, f"{name}.savings") for kind, saved in savings.items()},
        )

    def least(self, branches: Sequence[str]) -> float:
        """Return the ratio with all branches in bfloat16 that save time by it."""
        return self.ratio - sum(self.savings.get(kind_of(name), 0.0) for name in branches)

    def sizes(self, branches: Sequence[str], limit: float) -> PartSizes:
        """Return the costs of the branches in time, and the room that `limit`, a ratio, leaves for them."""
        costs = {}
        for name in branches:
            saved = round(_UNIT * self.savings.get(kind_of(name), 0.0))
            costs[name] = {"float32": saved, "bf16": 0} if saved else {"float32": 0}
        return PartSizes(costs, round(_UNIT * (limit - self.least(branches))))


def kind_of(branch: str) -> str:
    """Return the kind of a branch, one of `branches.KINDS`."""
    return branch.rpartition(".")[2]


@torch.no_grad()
def time_network(network: EquiformerV2, dense: EquiformerV2, batch: Batch, products: bool = True) -> Timing:
    """Time a folded network, with all branches in float32 and with those of either kind in bfloat16.

    Args:
        network: dense or pruned, with plain weights; the dense one itself has the ratio 1.
        dense: the folded dense network.
        batch: structures of a call, on the networks' device.
        products: whether branches may multiply in bfloat16.
    """

    def ratio() -> float:
        return compare_latency(lambda: network(batch), lambda: dense(batch)).ratio

    plain = 1.0 if network is dense else ratio()
    if not products or not can_save_time(network):
        return Timing(plain)
    if network is dense:
        network = folded(dense)
    savings = {}
    for kind in KINDS:
        branches = [name for name in branch_names(network) if kind_of(name) == kind]
        if branches:
            with in_bf16(network, branches):
                saved = (plain - ratio()) / len(branches)
            if saved > 0:
                savings[kind] = saved
    return Timing(plain, savings)

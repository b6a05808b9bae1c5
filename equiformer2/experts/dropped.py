"""Knowledge of a pruned file about the experts that it no longer holds, for the bound of any structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.experts import scores
from equiformer2.experts.gate import ExpertGate
from equiformer2.experts.network import ExpertNetwork
from equiformer2.experts.settings import MOST_EXPERTS
from equiformer2.values import Items, Number, Whole, mapping

_ROUNDING = 1e-4
KEY = "expert_pruning"
"""Part of a file's provenance that tells of the last pruning."""


@dataclass(frozen=True)
class DroppedExperts:
    """Gate and norms of the experts of a file before it was pruned.

    Attributes:
        kept: numbers of the experts that are left, in the order before.
        weight: `[K - M, hidden]`, rows of the gate's last layer for the dropped ones.
        bias: `[K - M]`.
        norms: `[K]` of every expert's weights, all together.
        limit: bound of the task: largest over its structures.
    """

    kept: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    norms: Tensor
    limit: float

    @classmethod
    def of(cls, network: ExpertNetwork, kept: Sequence[int], coefficients: Tensor) -> DroppedExperts:
        """Take what is needed from the whole network.

        Args:
            network: with all experts.
            kept: numbers of those that stay.
            coefficients: `[B, K]` of structures of the task.
        """
        last = network.gate.out
        gone = [each for each in range(network.settings.num_experts) if each not in set(kept)]
        norms = scores.expert_norms(network.expert_weights()).norm(dim=0)
        weight, bias = last.weight.detach()[gone].double(), last.bias.detach()[gone].double()
        limit = float(scores.change_bound(coefficients, norms[None], kept).max())
        return cls(tuple(kept), weight, bias, norms, limit)

    def bounds(self, gate: ExpertGate, task: int, compositions: Tensor) -> Tensor:
        """Bound the norm of the change of all weights together.

        Args:
            gate: of the pruned file.
            task: number.
            compositions: `[B, Z]`.

        Returns:
            `[B]` float64.

        Raises:
            InputError: the gate is another one.
        """
        if (self.weight.shape[1], len(self.kept)) != (gate.out.in_features, gate.out.out_features):
            raise InputError(f"{KEY} does not fit the gate of the file: prune the file again")
        gone = [each for each in range(len(self.norms)) if each not in set(self.kept)]
        logits = torch.zeros(len(compositions), len(self.norms), dtype=torch.float64)
        with torch.no_grad():
            features = gate.features(compositions, torch.full((len(compositions),), task))
            logits[:, list(self.kept)] = gate.out(features).double()
            logits[:, gone] = features.double() @ self.weight.T + self.bias
        return scores.change_bound(logits.softmax(1), self.norms[None], self.kept)[:, 0]

    def excess(self, gate: ExpertGate, task: int, composition: Tensor) -> float | None:
        """Return the bound for a composition `[Z]` where it is larger than those of the task's structures.

        None where it is not, rounding aside; arguments as `bounds`.
        """
        bound = float(self.bounds(gate, task, composition[None])[0])
        return bound if bound > self.limit * (1 + _ROUNDING) else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "kept": list(self.kept),
            "dropped_gate": {"weight": self.weight.tolist(), "bias": self.bias.tolist()},
            "norms": self.norms.tolist(),
            "limit": self.limit,
        }

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any], source: str) -> DroppedExperts | None:
        """Read what `to_dict` gave; None for a file that was never pruned.

        Args:
            provenance: of the file.
            source: name of the file, for errors.

        Raises:
            InputError: a part is missing or does not fit the others.
        """
        if KEY not in provenance:
            return None
        where = f"{source}: {KEY}"
        values = mapping(provenance[KEY], where)
        gate = mapping(values.get("dropped_gate"), f"{where}: dropped_gate")
        norms = Items(Number(0.0), MOST_EXPERTS).read(values.get("norms"), f"{where}: norms")
        kept = Items(Whole(0, len(norms) - 1), MOST_EXPERTS).read(values.get("kept"), f"{where}: kept")
        gone = len(norms) - len(kept)
        rows = Items(Items(Number()), MOST_EXPERTS).read(gate.get("weight"), f"{where}: weight")
        bias = Items(Number(), MOST_EXPERTS).read(gate.get("bias"), f"{where}: bias")
        widths = {len(row) for row in rows}
        if len(set(kept)) < len(kept) or gone < 1 or len(rows) != gone or len(bias) != gone:
            raise InputError(f"{where} does not tell of {gone} dropped experts: prune the file again")
        if len(widths) != 1 or not kept:
            raise InputError(f"{where} does not fit the gate of the file: prune the file again")
        limit = Number(0.0).read(values.get("limit"), f"{where}: limit")
        weight, shift, sizes = (torch.tensor(each, dtype=torch.float64) for each in (rows, bias, norms))
        return cls(tuple(kept), weight, shift, sizes, limit)

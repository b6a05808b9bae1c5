"""Knowledge of a pruned file about the experts that it no longer holds, for the bound of any structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from equiformer2.checkpoint.contents import WeightsKind
from equiformer2.errors import InputError
from equiformer2.experts import scores
from equiformer2.experts.gate import ExpertGate
from equiformer2.experts.settings import MOST_EXPERTS
from equiformer2.values import Items, Number, OneOf, Whole, mapping

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
        products: `[K, K]` inner products of the experts, of all their weights together.
        limit: bound of the task: largest over its structures.
        weights: `raw` or `averaged`, the weights that all this is of.
    """

    kept: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    products: Tensor
    limit: float
    weights: str

    @classmethod
    def of(
        cls, gate: ExpertGate, products: Tensor, kept: Sequence[int], coefficients: Tensor, weights: str
    ) -> DroppedExperts:
        """Take what is needed of the whole network.

        Args:
            gate: of all experts.
            products: `[weights, K, K]` of `scores.expert_products`.
            kept: numbers of those that stay.
            coefficients: `[B, K]` of structures of the task.
            weights: `raw` or `averaged`.
        """
        last, together = gate.out, products.sum(0)
        gone = [each for each in range(len(together)) if each not in set(kept)]
        weight, bias = last.weight.detach()[gone].double(), last.bias.detach()[gone].double()
        limit = float(scores.change_bound(coefficients, together[None], kept).max())
        return cls(tuple(kept), weight, bias, together, limit, weights)

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
        gone = [each for each in range(len(self.products)) if each not in set(self.kept)]
        logits = torch.zeros(len(compositions), len(self.products), dtype=torch.float64)
        with torch.no_grad():
            features = gate.features(compositions, torch.full((len(compositions),), task))
            logits[:, list(self.kept)] = gate.out(features).double()
            logits[:, gone] = features.double() @ self.weight.T + self.bias
        return scores.change_bound(logits.softmax(1), self.products[None], self.kept)[:, 0]

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
            "products": self.products.tolist(),
            "limit": self.limit,
            "weights": self.weights,
        }

    @classmethod
    def from_provenance(
        cls, provenance: Mapping[str, Any], source: str, weights: str
    ) -> DroppedExperts | None:
        """Read what `to_dict` gave; None for a file that was never pruned, or was by its other weights.

        Args:
            provenance: of the file.
            source: name of the file, for errors.
            weights: `raw` or `averaged`, those in use.

        Raises:
            InputError: a part is missing or does not fit the others.
        """
        if KEY not in provenance:
            return None
        where = f"{source}: {KEY}"
        values = mapping(provenance[KEY], where)
        gate = mapping(values.get("dropped_gate"), f"{where}: dropped_gate")
        products = Items(Items(Number(), MOST_EXPERTS), MOST_EXPERTS).read(
            values.get("products"), f"{where}: products"
        )
        if not products or any(len(row) != len(products) for row in products):
            raise InputError(f"{where}: products must be a square table: prune the file again")
        kept = Items(Whole(0, len(products) - 1), MOST_EXPERTS).read(values.get("kept"), f"{where}: kept")
        gone = len(products) - len(kept)
        rows = Items(Items(Number()), MOST_EXPERTS).read(gate.get("weight"), f"{where}: weight")
        bias = Items(Number(), MOST_EXPERTS).read(gate.get("bias"), f"{where}: bias")
        widths = {len(row) for row in rows}
        if len(set(kept)) < len(kept) or gone < 1 or len(rows) != gone or len(bias) != gone:
            raise InputError(f"{where} does not tell of {gone} dropped experts: prune the file again")
        if len(widths) != 1 or not kept:
            raise InputError(f"{where} does not fit the gate of the file: prune the file again")
        limit = Number(0.0).read(values.get("limit"), f"{where}: limit")
        of = OneOf(*get_args(WeightsKind)).read(values.get("weights"), f"{where}: weights")
        weight, shift, table = (torch.tensor(each, dtype=torch.float64) for each in (rows, bias, products))
        return cls(tuple(kept), weight, shift, table, limit, of) if of == weights else None

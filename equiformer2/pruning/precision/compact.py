"""Networks and files with the precisions of a plan, and how large they are."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Checkpoint
from equiformer2.checkpoint.compact import CompactState
from equiformer2.checkpoint.contents import Contents
from equiformer2.checkpoint.native import native_content, write_native
from equiformer2.checkpoint.training_data import inherited
from equiformer2.model import EquiformerV2
from equiformer2.model.branches import set_bf16_branches
from equiformer2.model.folding import check_plain
from equiformer2.model.parametrizations import form_of, rounded, store
from equiformer2.pruning.precision.plan import PrecisionPlan, matrices
from equiformer2.pruning.structured.apply import shrink
from equiformer2.pruning.structured.plan import PruningPlan

PER_TENSOR = 300
"""Bytes that a stored tensor takes in a file at most, beside its numbers: header, padding, name and shape."""


def compact_network(model: EquiformerV2, plan: PrecisionPlan) -> EquiformerV2:
    """Make the network of a plan: pruned, with its matrices in the plan's precisions.

    Args:
        model: dense network with plain weights; it is left as it is.
        plan: precisions, and units to keep.

    Returns:
        A network in evaluation mode whose stored weights are buffers.

    Raises:
        InputError: the plan does not fit the network, or weights are parametrized.
    """
    check_plain(model, "a choice of precisions")
    plan = plan.checked(model.config)
    small = copy.deepcopy(model) if plan.pruning is None else shrink(model, plan.pruning)
    for name, precision in plan.modules:
        store(small.get_submodule(name), "weight", precision)
    set_bf16_branches(small, plan.products)
    return small.eval()


@contextmanager
def as_rounded(model: EquiformerV2, precisions: Mapping[str, str]) -> Iterator[None]:
    """Context in which weights have the values that they have once they are stored.

    It is how searches try precisions: nothing is parametrized, and the weights are restored afterwards.

    Args:
        model: network with plain weights.
        precisions: module's name -> precision.
    """
    former = {}
    with torch.no_grad():
        try:
            for name, precision in precisions.items():
                if precision == "float32":
                    continue
                weight = model.get_submodule(name).weight
                former[name] = weight.detach().clone()  # type: ignore[operator]
                weight.copy_(rounded(former[name], precision))  # type: ignore[operator]
            yield
        finally:
            for name, value in former.items():
                model.get_submodule(name).weight.copy_(value)  # type: ignore[operator, union-attr]


def matrix_bytes(shape: tuple[int, ...], precision: str) -> int:
    """Count the bytes that a matrix takes in a file, at most."""
    if precision == "float32":
        return 4 * torch.Size(shape).numel()
    stored = form_of(precision, shape).stored_shapes()
    sizes = [size.numel() * torch.empty(0, dtype=dtype).element_size() for size, dtype in stored]
    return sum(sizes) + PER_TENSOR * len(sizes)


class FileSize:
    """Size of the file of a network, added up for every choice of precisions.

    Args:
        checkpoint: where the network comes from.
        model: the network, dense or pruned, with plain weights.
        pruning: plan of the network; None for the dense one.

    Attributes:
        float32: bytes of the file in float32, with one kind of weights.
        islands: bytes of all that stays float32, and of what the file tells.
        matrices: name -> shape of what may have other precisions.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: EquiformerV2, pruning: PruningPlan | None = None
    ) -> None:
        self.matrices = matrices(model)
        plan = PrecisionPlan(tuple(dict.fromkeys(self.matrices, "int8").items()), pruning)
        self.float32 = self._measured(contents_of(checkpoint, model, {}))
        told = self._measured(contents_of(checkpoint, model, provenance_of(checkpoint, plan)))
        self.islands = told - sum(matrix_bytes(shape, "float32") for shape in self.matrices.values())

    @staticmethod
    def _measured(contents: Contents) -> int:
        buffer = io.BytesIO()
        torch.save(native_content("", contents), buffer)
        return buffer.getbuffer().nbytes

    def of(self, precisions: Mapping[str, str]) -> int:
        """Return the bytes for precisions by module, at most; others are float32."""
        return self.islands + sum(
            matrix_bytes(shape, precisions.get(name, "float32")) for name, shape in self.matrices.items()
        )


def contents_of(checkpoint: Checkpoint, model: EquiformerV2, provenance: Mapping[str, Any]) -> Contents:
    """Return the contents of a native file of `model`, a network that was made from `checkpoint`.

    The surroundings that a checkpoint knows are left out, as for pruned networks: another network sees them
    differently.
    """
    return Contents(
        source="the network",
        source_format="equiformer2",
        config=model.config,
        weights={checkpoint.weights: CompactState.from_model(model)},
        normalizers=checkpoint.normalizers,
        energy_kind=checkpoint.energy_kind,
        provenance={**inherited(checkpoint.provenance), **provenance},
    )


def write_compact(path: AnyPath, checkpoint: Checkpoint, model: EquiformerV2, plan: PrecisionPlan) -> int:
    """Write the checkpoint of a compact network, atomically.

    Args:
        path: the file.
        checkpoint: where the network comes from.
        model: as `compact_network` makes it.
        plan: its plan, for the provenance.

    Returns:
        Bytes of the file.
    """
    write_native(path, contents_of(checkpoint, model, provenance_of(checkpoint, plan)))
    return Path(path).stat().st_size


def provenance_of(checkpoint: Checkpoint, plan: PrecisionPlan) -> dict[str, Any]:
    """Return what a compact file tells about its origin."""
    return {"quantized_from": checkpoint.provenance, "precision_plan": plan.to_dict()}

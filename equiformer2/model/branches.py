"""Branches of the blocks whose matrix products run in bfloat16 during inference, the others in float32.

A branch is the attention (`ga`) or the feed-forward network (`ffn`) of a block. Its input is normed and its
output added in float32, and inside it rotations, softmax and sums keep the precision that they have under
autocast. `EquiformerV2.fold_weights` puts the choice into effect, where the device multiplies bfloat16; on
other devices, in training and with gradients, all branches compute in float32.
"""

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from equiformer2.errors import InputError
from equiformer2.values import shown_name

KINDS = ("ga", "ffn")
_NAME = re.compile(r"blocks\.(\d{1,6})\.(ga|ffn)")


def branch_names(model: nn.Module) -> list[str]:
    """List the branches of a network by name, such as `blocks.0.ga`; those that were pruned away are not."""
    blocks: nn.ModuleList = model.blocks  # type: ignore[assignment]
    return [
        f"blocks.{number}.{kind}"
        for number, block in enumerate(blocks)
        for kind in KINDS
        if getattr(block, kind) is not None
    ]


def is_branch_name(text: str) -> bool:
    """Tell whether `text` could name a branch of some network."""
    return _NAME.fullmatch(text) is not None


def bf16_branches(model: nn.Module) -> tuple[str, ...]:
    """Name the branches that are to multiply in bfloat16."""
    return tuple(
        name for name in branch_names(model) if name.rpartition(".")[2] in _block(model, name).bf16_branches
    )


def set_bf16_branches(model: nn.Module, names: Collection[str]) -> None:
    """Choose the branches that are to multiply in bfloat16; the next `fold_weights` puts it into effect.

    Args:
        model: the network.
        names: of the branches; all others multiply in the precision of the weights.

    Raises:
        InputError: the network has no such branch.
    """
    known = set(branch_names(model))
    for name in names:
        if name not in known:
            raise InputError(
                f"the network has no branch {shown_name(name)}: its branches are blocks.N.ga and blocks.N.ffn"
            )
    for name in known:
        kind = name.rpartition(".")[2]
        block = _block(model, name)
        block.bf16_branches = block.bf16_branches - {kind} | ({kind} if name in names else set())


def _block(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name.rpartition(".")[0])

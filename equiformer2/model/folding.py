"""What follows from weights, computed once for inference and forgotten when they may change."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equiformer2.kernels.chunks import cast_to_autocast


class Folding(nn.Module):
    """A module that can prepare for inference with its present weights.

    What it has prepared is forgotten by `train()`, by moving or loading weights and in copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unfold()

    def fold(self, dtype: torch.dtype | None, packed: bool) -> None:
        """Prepare.

        Args:
            dtype: of the GEMMs, if not that of the weights.
            packed: whether matrices take the layout of `kernels.linear.pack`.
        """
        raise NotImplementedError

    def unfold(self) -> None:
        """Forget what `fold` has computed: the weights have changed."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Folding":
        """Weights of a network in training change."""
        if mode:
            self.unfold()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Folding":
        self.unfold()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unfold()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        # Packed matrices can be neither copied nor pickled.
        return {name: None if name.startswith("_folded") else value for name, value in self.__dict__.items()}


def usable(folded: Sequence[Tensor] | None, weight: Tensor) -> bool:
    """Whether what has been folded may stand in for `weight`: no gradients, and GEMMs in its precision."""
    if folded is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return folded[0].dtype == cast_to_autocast(weight[:0])[0].dtype

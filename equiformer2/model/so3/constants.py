"""Constants that follow from the configuration alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DerivedConstants(nn.Module):
    """Module with constants computed once in float64 and kept out of the state dict.

    `model.double()` gives the constants in full float64, not float32 values converted back: they are
    rounded again from the float64 original whenever the module changes its precision.
    """

    def __init__(self) -> None:
        super().__init__()
        self._originals: dict[str, Tensor] = {}

    def add_constant(self, name: str, value: Tensor) -> None:
        """Register float64 `value` as the attribute `name`, in the module's own precision and device."""
        self._originals[name] = value.double()
        self.register_buffer(name, value.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DerivedConstants":
        super()._apply(fn, recurse)
        for name, original in self._originals.items():
            converted = getattr(self, name)
            if converted.is_floating_point() and converted.device.type != "meta":
                setattr(self, name, original.to(device=converted.device, dtype=converted.dtype))
        return self

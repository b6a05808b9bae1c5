"""Precision of the matrix products in inference; sums, norms and outputs are in float32 whatever it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from equiformer2.errors import InputError

# Ampere: the first with TF32 and bfloat16 in its tensor cores.
_FIRST_CAPABILITY = (8, 0)
PRECISIONS = ("float32", "tf32", "bf16")


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `InputError` for an unknown precision, or one that the device does not have."""
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision 'tf32' needs a CUDA device, not {device.type}: use 'float32' or 'bf16'")
    if precision != "float32" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _FIRST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise InputError(
                f"precision {precision!r} needs a GPU of compute capability 8.0, and {name} has "
                f"{capability[0]}.{capability[1]}: use 'float32'"
            )


@contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Context of one of `PRECISIONS`. Global settings of torch are put back at the end."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""Device and precision of new tensors, independent of torch's defaults."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from equiformer2.errors import InputError

_CPU = torch.device("cpu")


@contextmanager
def own_defaults(device: str | torch.device = _CPU) -> Iterator[None]:
    """Make new tensors float32 and on `device` by default; a context or a decorator.

    `torch.set_default_dtype` and `torch.set_default_device` are settings of the process: loading, building
    and running a network must not depend on who called them last.
    """
    dtype, device = torch.get_default_dtype(), torch.device(device)
    if dtype == torch.float32 and torch.get_default_device() == device:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(dtype)


def usable_device(device: str | torch.device) -> torch.device:
    """Check that numbers can be computed on `device` here, and return it.

    Raises:
        InputError: there is no such kind of device, or not here; or it holds no numbers (`meta`).
    """
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise InputError("the device 'meta' holds shapes and no numbers: " + _HINT)
        # Devices are numbered from 0; torch takes any number for the processor.
        if chosen.type == "cpu" and chosen.index not in (None, 0):
            raise InputError(f"the device {str(device)!r} does not exist: there is one 'cpu'")
        float(torch.ones((), device=chosen, dtype=torch.float32))
    except InputError:
        raise
    except Exception as error:  # each backend that is missing raises something of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the device {str(device)!r} cannot be used on this machine ({reason[:200]}): {_HINT}"
        ) from error
    return torch.device("cpu") if chosen.type == "cpu" else chosen


_HINT = 'use "cpu", or "cuda" where torch finds a GPU'

"""Operations on tensors of a device for which the host does not wait."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the host goes on at once."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from other memory it would wait


def numbers_of(mask: Tensor, count: int) -> Tensor:
    """`[count]` ascending numbers of the true entries of `mask` `[P]`.

    Args:
        mask: bool.
        count: how many are true. `mask.nonzero()` would wait for the device to tell it.
    """
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    # All others go to the place behind the last, which is cut off.
    numbers = place.new_empty(count + 1).scatter_(0, place, torch.arange(len(mask), device=mask.device))
    return numbers[:count]

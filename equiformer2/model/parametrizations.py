"""Parametrizations of weights (`torch.nn.utils.parametrize`), which every layer reads through `folding.read`.

A low-rank map adds a product of two small matrices to a frozen weight (LoRA, Hu et al. 2021). It keeps
equivariance wherever a weight does so by being shared: one matrix per degree in `SO3Linear`, and in an SO(2)
convolution one matrix `[2 out, in]` whose two halves, real and imaginary, the orders m and -m both use. Any
change of such a matrix, entry by entry, is shared in the same way. Maps of a mixture over the components of a
degree would not be (the public ELoRA of SevenNet).
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from equiformer2.errors import InputError


class LowRank(nn.Module):
    """W + scale * left @ right, with masks that hold pruned entries of both at zero.

    A weight of three dimensions is a stack of matrices, one per degree, each with factors of its own.

    Args:
        left: `[..., out, rank]`.
        right: `[..., rank, in]`.
        scale: factor of the product.
        left_kept, right_kept: bool masks of the same shapes; None keeps everything.

    Raises:
        InputError: the shapes do not fit each other.
    """

    left_kept: Tensor
    right_kept: Tensor

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        scale: float,
        left_kept: Tensor | None = None,
        right_kept: Tensor | None = None,
    ) -> None:
        super().__init__()
        if left.dim() not in (2, 3) or left.dim() != right.dim() or left.shape[-1] != right.shape[-2]:
            raise InputError(
                f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)} make no low-rank map: they "
                "must be [out, rank] and [rank, in], or stacks of these"
            )
        self.left, self.right, self.scale = nn.Parameter(left), nn.Parameter(right), scale
        for name, factor, kept in (("left", left, left_kept), ("right", right, right_kept)):
            mask = torch.ones_like(factor, dtype=torch.bool) if kept is None else kept
            if mask.shape != factor.shape:
                raise InputError(f"the mask of the {name} factor has another shape than the factor")
            self.register_buffer(f"{name}_kept", mask)

    @classmethod
    def at_start(
        cls, shape: torch.Size, rank: int, scale: float, generator: torch.Generator | None = None
    ) -> "LowRank":
        """Make a map that changes nothing yet: `left` is zero, `right` random with rows of length about 1.

        Args:
            shape: of the weight, `[out, in]` or `[degrees, out, in]`.
            rank: of the product.
            scale: factor of the product.
            generator: of the random numbers.
        """
        *stack, rows, columns = shape
        right = torch.randn(*stack, rank, columns, generator=generator) / math.sqrt(columns)
        return cls(torch.zeros(*stack, rows, rank), right, scale)

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.left.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight that the map belongs to."""
        return torch.Size((*self.left.shape[:-1], self.right.shape[-1]))

    @property
    def kept(self) -> int:
        """Number of entries of both factors that are not pruned."""
        return int(self.left_kept.sum()) + int(self.right_kept.sum())

    @property
    def size(self) -> int:
        """Number of entries of both factors."""
        return self.left.numel() + self.right.numel()

    @torch.no_grad()
    def prune(self, left_kept: Tensor, right_kept: Tensor) -> None:
        """Set the masks, and the entries outside them to zero."""
        for factor, mask, kept in (
            (self.left, self.left_kept, left_kept),
            (self.right, self.right_kept, right_kept),
        ):
            mask.copy_(kept)
            factor.masked_fill_(~mask, 0.0)

    def forward(self, weight: Tensor) -> Tensor:
        """Add the map to `weight`."""
        # Masked here, too: entries outside get no gradient, so that nothing ever moves them from zero.
        product = (self.left * self.left_kept) @ (self.right * self.right_kept)
        return weight + self.scale * product


def attach(model: nn.Module, maps: Mapping[str, LowRank]) -> None:
    """Put low-rank maps on weights of a network, by the weights' names in the plain network.

    Args:
        model: the network; other parametrizations of it stay, and are computed first.
        maps: moved to device and precision of the weights.

    Raises:
        InputError: there is no such weight, or it has another shape.
    """
    places = {name: find_weight(model, name, each.shape) for name, each in maps.items()}
    for name, (module, leaf) in places.items():
        weight = getattr(module, leaf)
        parametrize.register_parametrization(module, leaf, maps[name].to(weight.device, weight.dtype))


def find_weight(model: nn.Module, name: str, shape: torch.Size) -> tuple[nn.Module, str]:
    """Find the module of a weight, and its attribute.

    Args:
        model: the network.
        name: of the weight in the plain network.
        shape: that it must have.

    Raises:
        InputError: there is no such weight, or it has another shape.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        weight = getattr(module, leaf)
    except AttributeError:
        weight = None
    if not isinstance(weight, Tensor):
        raise InputError(f"the network has no weight {name}")
    if weight.shape != shape:
        raise InputError(
            f"the map of {name} is for a weight of shape {tuple(shape)}, and the network's has "
            f"{tuple(weight.shape)}"
        )
    return module, leaf


def detach(model: nn.Module, only: Collection[LowRank] | None = None) -> None:
    """Take low-rank maps off a network, whose weights are then those of before.

    Args:
        model: the network; its other parametrizations stay.
        only: the maps to take off; None for all.
    """
    for module in list(model.modules()):
        own = module._modules.get("parametrizations")
        if not isinstance(own, nn.ModuleDict):
            continue
        for name, listed in list(own.items()):
            assert isinstance(listed, ParametrizationList)
            places = [
                index
                for index, each in enumerate(listed)
                if isinstance(each, LowRank) and (only is None or each in only)
            ]
            if len(places) == len(listed):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                continue
            for index in reversed(places):
                del listed[index]


def low_rank_maps(model: nn.Module) -> dict[str, LowRank]:
    """Find the low-rank maps of a network, by the names of the weights in the plain network."""
    found = {}
    for path, module in model.named_modules():
        own = module._modules.get("parametrizations")
        if isinstance(module, ParametrizationList) or not isinstance(own, nn.ModuleDict):
            continue
        for name, listed in own.items():
            assert isinstance(listed, ParametrizationList)
            for each in listed:
                if isinstance(each, LowRank):
                    found[f"{path}.{name}".removeprefix(".")] = each
    return found

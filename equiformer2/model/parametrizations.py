"""Weights computed from other tensors (`torch.nn.utils.parametrize`); layers read them by `folding.read`.

Low-rank maps add a product of two small matrices to a frozen weight (LoRA, Hu et al. 2021). Stored forms keep
a weight as bfloat16 or integers. Neither breaks equivariance, because a weight keeps it by being shared: one
matrix per degree in `SO3Linear`, and in an SO(2) convolution one matrix `[2 out, in]` whose two halves, real
and imaginary, the orders m and -m both use. Any change of such a matrix, entry by entry, is shared in the
same way. Maps of a mixture over the components of a degree would not be (the public ELoRA of SevenNet).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from equiformer2.errors import InputError
from equiformer2.values import shown

StoredKind = Literal["bf16", "int8", "int4"]
STORED_KINDS: tuple[str, ...] = get_args(StoredKind)
#: Bits of one number; the scales of rows come on top.
BITS: Mapping[str, int] = {"float32": 32, "bf16": 16, "int8": 8, "int4": 4}
_LARGEST = {8: 127, 4: 7}
#: Shares of a row's largest entry that 4 bits may stand for: the large entries are cut, the others finer.
_CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


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
        register(module, leaf, maps[name].to(weight.device, weight.dtype))


def register(module: nn.Module, name: str, form: nn.Module, unsafe: bool = False) -> None:
    """Compute a weight by `form` from now on; the module can then still be pickled, unlike torch's.

    Args:
        module: holds the weight.
        name: of the weight.
        form: see `parametrize.register_parametrization`.
        unsafe: see there.
    """
    parametrize.register_parametrization(module, name, form, unsafe=unsafe)
    type(module).__reduce_ex__ = _reduced  # type: ignore[method-assign,assignment]


def _reduced(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Take a parametrized module apart for pickle, which cannot find the class that torch made for it."""
    state = dict(vars(module)), tuple(module.parametrizations)  # type: ignore[arg-type]
    return _empty, type(module).__bases__[:1], state, None, None, _fill


def _empty(base: type[nn.Module]) -> nn.Module:
    """Make a parametrized module of a class, without content."""
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    type(module).__reduce_ex__ = _reduced  # type: ignore[method-assign,assignment]
    return module


def _fill(module: nn.Module, state: tuple[dict[str, Any], Sequence[str]]) -> None:
    """Give a module of `_empty` its content, and the names of its parametrized weights."""
    content, names = state
    module.__setstate__(content)
    for name in names:
        parametrize._inject_property(module, name)


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
                _give_own_class(module)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                continue
            for index in reversed(places):
                del listed[index]


def _give_own_class(module: nn.Module) -> None:
    """Take a parametrized module out of the class that it shares with its copies.

    torch makes a class per parametrized module and removes the weight's property from it with the
    parametrization: copies made by `copy.deepcopy` would lose their weight, too.
    """
    shared = type(module)
    own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)


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


class BFloat16Numbers(nn.Module):
    """Weight stored in bfloat16 and read in `dtype`.

    Args:
        shape: of the weight.
    """

    #: Told to `folding`: matrices computed from it are not kept, or they would take the memory that it saves.
    is_compact = True
    kind = "bf16"

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = torch.Size(shape)

    def forward(self, numbers: Tensor) -> Tensor:
        """Widen the stored numbers to float32."""
        # A network that was cast as a whole, by `.double()`, keeps that precision.
        return numbers.float() if numbers.dtype == torch.bfloat16 else numbers

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        """Round a weight."""
        check_numbers(weight)
        return (weight.to(torch.bfloat16),)

    def stored_shapes(self) -> list[tuple[torch.Size, torch.dtype]]:
        """List shape and type of the tensors that `forward` takes."""
        return [(self.shape, torch.bfloat16)]


class IntegerRows(nn.Module):
    """Weight stored as integers of 8 or 4 bits with one scale per row, symmetric about zero.

    A row is what one output sums over: per degree and output of `SO3Linear`, per output of the real or the
    imaginary part of an SO(2) map, per element of a table of embeddings.

    Args:
        shape: of the weight, `[..., columns]`.
        bits: 8 or 4. Two integers of 4 bits share a byte; the last byte of an odd row holds one.
    """

    is_compact = True

    def __init__(self, shape: Sequence[int], bits: int) -> None:
        super().__init__()
        self.shape, self.bits = torch.Size(shape), bits

    @property
    def kind(self) -> str:
        """Name of the form."""
        return f"int{self.bits}"

    def forward(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """Compute the weight, in the precision of `scale`.

        Args:
            numbers: `[..., columns]` int8, or `[..., ceil(columns / 2)]` uint8 of packed pairs.
            scale: `[..., 1]`.
        """
        if self.bits == 4:
            pairs = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(-2)
            numbers = pairs[..., : self.shape[-1]].to(torch.int8) - 8
        return numbers.to(scale.dtype) * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Round a weight to the nearest integers; 4 bits at the scale of the least squared error per row."""
        check_numbers(weight)
        largest = _LARGEST[self.bits]
        top = weight.abs().amax(-1, keepdim=True)
        numbers, scale = self._rounded(weight, top / largest)
        if self.bits == 4:
            least = self._squared_error(weight, numbers, scale)
            for share in _CLIPPED[1:]:
                other, other_scale = self._rounded(weight, share * top / largest)
                error = self._squared_error(weight, other, other_scale)
                better = error < least
                numbers, scale = torch.where(better, other, numbers), torch.where(better, other_scale, scale)
                least = torch.where(better, error, least)
            shifted = (numbers + 8).to(torch.uint8)
            if shifted.shape[-1] % 2:
                shifted = nn.functional.pad(shifted, (0, 1), value=8)
            return shifted[..., ::2] | (shifted[..., 1::2] << 4), scale
        return numbers.to(torch.int8), scale

    def stored_shapes(self) -> list[tuple[torch.Size, torch.dtype]]:
        """List shape and type of the tensors that `forward` takes."""
        *rows, columns = self.shape
        numbers = torch.Size([*rows, columns if self.bits == 8 else -(-columns // 2)])
        return [
            (numbers, torch.int8 if self.bits == 8 else torch.uint8),
            (torch.Size([*rows, 1]), torch.float32),
        ]

    def _rounded(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Integers, still as floating-point numbers, and the scale; both zero for a row of zeros."""
        largest = _LARGEST[self.bits]
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
        return (weight / divisor).round().clamp(-largest, largest), scale

    @staticmethod
    def _squared_error(weight: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
        return (numbers * scale - weight).square().sum(-1, keepdim=True)


Form = BFloat16Numbers | IntegerRows


def form_of(kind: str, shape: Sequence[int]) -> Form:
    """Make the parametrization of a form by its name.

    Args:
        kind: `bf16`, `int8` or `int4`.
        shape: of the weight.

    Raises:
        InputError: there is no such form, or the weight has no rows.
    """
    if kind not in STORED_KINDS:
        raise InputError(f"weights cannot be stored as {shown(kind)}: use one of {', '.join(STORED_KINDS)}")
    if len(shape) < 2 and kind != "bf16":
        raise InputError(f"a weight of shape {tuple(shape)} has no rows to store as {kind}: leave it out")
    return BFloat16Numbers(shape) if kind == "bf16" else IntegerRows(shape, BITS[kind])


def check_numbers(weight: Tensor) -> None:
    """Refuse a weight that holds NaN or infinity, which would spoil a whole row."""
    if not bool(torch.isfinite(weight).all()):
        raise InputError(
            "a weight holds numbers that are not finite and cannot be rounded: check the network"
        )


def rounded(weight: Tensor, kind: str) -> Tensor:
    """Compute what a forward pass reads of `weight` once it is stored as `kind`, which may be float32."""
    if kind == "float32":
        return weight
    form = form_of(kind, weight.shape)
    return form(*form.right_inverse(weight.detach()))


def store(module: nn.Module, name: str, kind: str, tensors: Sequence[Tensor] | None = None) -> None:
    """Replace the parameter `name` of `module` by its stored form, which no optimizer changes.

    Args:
        module: with plain weights.
        name: of the parameter, which is gone afterwards: the stored tensors are buffers.
        kind: `bf16`, `int8` or `int4`.
        tensors: what the form stores, as a file holds it; None rounds the present weight.

    Raises:
        InputError: as `form_of` and `check_numbers`.
    """
    weight = getattr(module, name).detach()
    form = form_of(kind, weight.shape)
    del module._parameters[name]
    # As a buffer: its stored form becomes buffers, too, which `requires_grad_` and optimizers leave alone.
    module.register_buffer(name, weight)
    register(module, name, form, unsafe=True)
    if tensors is not None:
        held = module.parametrizations[name]  # type: ignore[index]
        for place, tensor in enumerate(tensors):
            getattr(held, f"original{place}").copy_(tensor)


def stored_form(module: nn.Module, name: str) -> tuple[Form, list[Tensor]] | None:
    """Return the form of a weight and what it stores; None for a weight of other kinds."""
    wrapped = module._modules.get("parametrizations")
    if not isinstance(wrapped, nn.ModuleDict) or name not in wrapped:
        return None
    held = wrapped[name]
    form = held[0]  # type: ignore[index]
    if not isinstance(form, BFloat16Numbers | IntegerRows):
        return None
    return form, [getattr(held, f"original{place}") for place in range(len(form.stored_shapes()))]


def stored_kinds(model: nn.Module) -> dict[str, str]:
    """Name the form of every stored weight by the weight's name in the plain network."""
    kinds = {}
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for name in getattr(module, "parametrizations", ()):
            found = stored_form(module, name)
            if found is not None:
                kinds[f"{path}.{name}".removeprefix(".")] = found[0].kind
    return kinds

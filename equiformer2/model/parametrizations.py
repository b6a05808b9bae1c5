"""Weights in a form of their own, behind `torch.nn.utils.parametrize`; forward passes read them as usual.

`folding.read` computes the matrix from what is stored. A form changes its entries alone. Maps per degree
and SO(2) maps, whose real and imaginary part serve +m and -m alike, commute with rotations whatever their
entries are, so none of these forms breaks equivariance.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equiformer2.errors import InputError
from equiformer2.values import shown

StoredKind = Literal["bf16", "int8", "int4"]
STORED_KINDS: tuple[str, ...] = get_args(StoredKind)
#: Bits of one number; the scales of rows come on top.
BITS: Mapping[str, int] = {"float32": 32, "bf16": 16, "int8": 8, "int4": 4}
_LARGEST = {8: 127, 4: 7}
#: Shares of a row's largest entry that 4 bits may stand for: the large entries are cut, the others finer.
_CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


class BFloat16Numbers(nn.Module):
    """Weight stored in bfloat16 and read in `dtype`.

    Args:
        shape: of the weight.
        dtype: precision in which it is read.
    """

    #: Told to `folding`: matrices computed from it are not kept, or they would take the memory that it saves.
    is_compact = True
    kind = "bf16"

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype

    def forward(self, numbers: Tensor) -> Tensor:
        """Widen the stored numbers."""
        # A network that was cast as a whole, by `.double()`, keeps that precision.
        return numbers.to(self.dtype) if numbers.dtype == torch.bfloat16 else numbers

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
    parametrize.register_parametrization(module, name, form, unsafe=True)
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

"""Weights of which some are stored in fewer bytes than float32, as a mapping that reads like plain ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.model.branches import bf16_branches, is_branch_name, set_bf16_branches
from equiformer2.model.equiformer import EquiformerV2
from equiformer2.model.folding import parametrized_weights
from equiformer2.model.parametrizations import form_of, store, stored_form, stored_kinds
from equiformer2.values import Items, Whole, mapping, shown, shown_name

_KEYS = {"kind", "shape", "tensors"}
_MOST_SIDE = 1 << 31
_MOST_BRANCHES = 10_000


class StoredWeight(NamedTuple):
    """Weight in a stored form (`model.parametrizations`).

    Attributes:
        kind: `bf16`, `int8` or `int4`.
        shape: of the weight.
        tensors: what the form stores.
    """

    kind: str
    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    def weight(self) -> Tensor:
        """Compute the weight in float32."""
        return form_of(self.kind, self.shape)(*self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values and tensors of a file."""
        return {"kind": self.kind, "shape": list(self.shape), "tensors": list(self.tensors)}

    @classmethod
    def from_dict(cls, values: Any, name: str) -> StoredWeight:
        """Read what `to_dict` gives; no tensor is made, and none is computed from it yet.

        Raises:
            InputError: naming `name` and the part that is missing, unknown or does not fit the others.
        """
        if set(mapping(values, name)) != _KEYS:
            raise InputError(f"{name} must hold {', '.join(sorted(_KEYS))} and nothing else")
        shape = tuple(Items(Whole(1, _MOST_SIDE), most=8).read(values["shape"], f"{name}: shape"))
        if not isinstance(values["kind"], str):
            raise InputError(f"{name}: kind must be a text, not {shown(values['kind'])}")
        try:
            expected = form_of(values["kind"], shape).stored_shapes()
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        tensors = values["tensors"]
        if (
            not isinstance(tensors, list | tuple)
            or not all(isinstance(tensor, Tensor) for tensor in tensors)
            or [(tensor.shape, tensor.dtype) for tensor in tensors] != expected
        ):
            form = " and ".join(f"{str(dtype)[6:]} {tuple(size)}" for size, dtype in expected)
            raise InputError(
                f"{name}: {values['kind']} of the shape {shape} needs tensors of the form {form}"
            )
        numbers = [tensor for tensor in tensors if tensor.is_floating_point()]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in numbers):
            raise InputError(f"{name} holds numbers that are not finite")
        return cls(values["kind"], shape, tuple(tensors))


class CompactState(Mapping[str, Tensor]):
    """Weights by name, of which the stored ones are computed in float32 when they are asked for.

    Args:
        plain: weights as they are.
        stored: the others.
        products: branches of the network that multiply in bfloat16 (`model.branches`).
    """

    def __init__(
        self, plain: Mapping[str, Tensor], stored: Mapping[str, StoredWeight], products: Sequence[str] = ()
    ) -> None:
        self.plain, self.stored, self.products = dict(plain), dict(stored), tuple(products)

    def __getitem__(self, name: str) -> Tensor:
        return self.plain[name] if name in self.plain else self.stored[name].weight()

    def __iter__(self) -> Iterator[str]:
        yield from self.plain
        yield from self.stored

    def __len__(self) -> int:
        return len(self.plain) + len(self.stored)

    @classmethod
    def from_model(cls, model: EquiformerV2) -> CompactState:
        """Take the weights of a network.

        Raises:
            InputError: a weight is parametrized in another way: merge it first.
        """
        state = model.state_dict()
        plain = {name: value for name, value in state.items() if "parametrizations." not in name}
        stored = {}
        for weight in parametrized_weights(model):
            path, _, name = weight.rpartition(".")
            module = model.get_submodule(path)
            found = stored_form(module, name)
            if found is None or len(module.parametrizations[name]) > 1:  # type: ignore[index, arg-type]
                raise InputError(f"{weight} is parametrized in a form that no file holds: merge it first")
            form, tensors = found
            stored[weight] = StoredWeight(form.kind, tuple(form.shape), tuple(tensors))
        return cls(plain, stored, bf16_branches(model))

    def put_into(self, model: EquiformerV2) -> None:
        """Store the same weights of a plain network in the same forms, and choose the same products."""
        set_bf16_branches(model, self.products)
        for weight, value in self.stored.items():
            path, _, name = weight.rpartition(".")
            store(model.get_submodule(path), name, value.kind, value.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> CompactState:
        """Apply a function of tensors to every tensor, stored as it is."""
        return CompactState(
            {name: change(tensor) for name, tensor in self.plain.items()},
            {
                name: value._replace(tensors=tuple(change(tensor) for tensor in value.tensors))
                for name, value in self.stored.items()
            },
            self.products,
        )

    @property
    def num_numbers(self) -> int:
        """Number of weights, from their shapes."""
        held = sum(tensor.numel() for tensor in self.plain.values())
        return held + sum(math.prod(value.shape) for value in self.stored.values())


def check_not_stored(model: EquiformerV2, source: AnyPath) -> None:
    """Refuse a network of which weights are stored in fewer bits, where the plain ones are needed.

    Args:
        model: as its checkpoint is loaded.
        source: the checkpoint.

    Raises:
        InputError: some are.
    """
    stored = stored_kinds(model)
    if stored:
        raise InputError(
            f"{source} holds {len(stored)} matrices in fewer bits already: give the float32 checkpoint that "
            "it was made of"
        )


def read_stored(values: Any, state: Mapping[str, Tensor], source: str, products: Any = ()) -> CompactState:
    """Read the stored weights of one kind from a native file.

    Args:
        values: weight's name -> `StoredWeight.to_dict()`.
        state: the plain weights of the same kind.
        source: names file and kind, for errors.
        products: names of the branches that multiply in bfloat16.

    Raises:
        InputError: as `StoredWeight.from_dict`, where a weight is there twice, and for a name of no branch.
    """
    if not isinstance(products, list | tuple) or len(products) > _MOST_BRANCHES:
        raise InputError(f"{source}: the products must be a list of names of branches")
    for name in products:
        if not isinstance(name, str) or not is_branch_name(name):
            raise InputError(f"{source}: the products name {shown_name(name)}, which is no branch")
    stored = {}
    for name, value in mapping(values, source).items():
        if name in state:
            raise InputError(f"{source}: {shown_name(name)} is there twice, stored and plain")
        stored[name] = StoredWeight.from_dict(value, f"{source}: {shown_name(name)}")
    return CompactState(state, stored, products)

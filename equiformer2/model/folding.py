"""Weights as forward passes read them, and the matrices that inference keeps while weights do not change.

Every weight may be wrapped with `torch.nn.utils.parametrize`: `read` gives the computed one. A module whose
weights go into matrix products is a `Folding`: it can keep rounded, merged and packed matrices for inference,
and computes them again when anything has changed that they depend on (`Snapshot`).
"""

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.optimizer import register_optimizer_step_post_hook

from equiformer2.errors import InputError
from equiformer2.kernels.chunks import cast_to_autocast, no_autocast
from equiformer2.kernels.linear import pack


def read(module: nn.Module, name: str = "weight") -> Tensor:
    """Give the weight `name` of `module`: the parameter, or what its parametrization computes now.

    A parametrization is computed at every call, so a layer reads each of its weights once per forward pass.
    It has the precision of its own tensors under autocast, too, and ignores `parametrize.cached()`, whose one
    memory for all threads may hold a tensor without gradients.
    """
    wrapped = module._modules.get("parametrizations")
    if not isinstance(wrapped, nn.ModuleDict) or name not in wrapped:
        return getattr(module, name)  # type: ignore[no-any-return]
    with _own_precision(module):
        return wrapped[name]()  # type: ignore[no-any-return]


def _own_precision(module: nn.Module) -> torch.autocast:
    """Context without autocast on the device of `module`."""
    return no_autocast(next(itertools.chain(module.parameters(), module.buffers())))


def parametrized_weights(model: nn.Module) -> list[str]:
    """List the weights that parametrizations compute, by their names in the plain network."""
    return [
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if not isinstance(module, ParametrizationList)
        for name in getattr(module, "parametrizations", ())
    ]


def plain_name(name: str) -> str:
    """Name the weight that a parameter is part of: `a.weight` of `a.parametrizations.weight.0.left`."""
    path, inside, rest = name.partition("parametrizations.")
    return path + rest.partition(".")[0] if inside else name


def check_plain(model: nn.Module, purpose: str) -> None:
    """Raise `InputError` where weights are parametrized and `purpose`, a noun, needs the plain parameters."""
    names = parametrized_weights(model)
    if names:
        raise InputError(
            f"{purpose} needs plain weights, and {len(names)} are parametrized ({names[0]} and others): call "
            "torch.nn.utils.parametrize.remove_parametrizations(module, name, leave_parametrized=True) first"
        )


def plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the state dictionary of the plain network that does what `model` does with `state`.

    Args:
        model: network with or without parametrizations; it is left as it is.
        state: values for `model`, as its `state_dict` gives them.

    Raises:
        InputError: `state` does not fit `model`.
    """
    names = parametrized_weights(model)
    if not names:
        return dict(state)
    network = copy.deepcopy(model)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the weights do not fit the parametrized network: {reason}") from error
    plain = {name: value for name, value in state.items() if "parametrizations." not in name}
    with torch.no_grad():
        for weight in names:
            path, _, name = weight.rpartition(".")
            plain[weight] = read(network.get_submodule(path), name)
    return plain


class Snapshot:
    """State of all weights below a module at one time, to tell later whether one has changed.

    It compares the parameters by identity, version and memory, and everything that a parametrization holds.
    Two things escape it: writes through `.data`, which autograd does not notice either, and a parametrization
    that depends on something outside its own attributes.

    Attributes:
        comparable: False where changes could not be noticed: tensors made in inference mode count no
            versions, and attributes of parametrizations other than tensors and plain values can change
            inside.
    """

    _optimizer_steps = 0

    def __init__(self, root: nn.Module) -> None:
        self.comparable = True
        self._step = Snapshot._optimizer_steps
        self._sizes: list[tuple[Mapping[str, Any], int]] = []
        self._items: list[tuple[Mapping[str, Any], str, Any]] = []
        self._tensors: list[tuple[Tensor, int, int]] = []
        # Memory that is held is not used for other tensors, so that addresses stay unique.
        self._memory: list[torch.UntypedStorage] = []
        inside: set[nn.Module] = set()
        for module in root.modules():
            if isinstance(module, ParametrizationList):
                inside.update(module.modules())
            if module in inside:
                self._add_all(module)
            else:
                self._add(module._modules)
                self._add(module._parameters)

    def is_current(self) -> bool:
        """Tell whether nothing has changed."""
        return (
            self.comparable
            and self._step == Snapshot._optimizer_steps
            and all([len(mapping) == size for mapping, size in self._sizes])
            and all([mapping.get(name) is value for mapping, name, value in self._items])
            and all([t._version == version for t, version, _ in self._tensors])
            and all([t.data_ptr() == address for t, _, address in self._tensors])
        )

    def _add_all(self, module: nn.Module) -> None:
        """Everything that the result of a parametrization may depend on."""
        attributes = vars(module)
        for name in _OF_ALL_MODULES & attributes.keys():
            if isinstance(attributes[name], dict):
                self._add(attributes[name])
        own = {name: value for name, value in attributes.items() if name not in _OF_ALL_MODULES}
        self.comparable &= all(isinstance(value, (Tensor, *_UNCHANGEABLE)) for value in own.values())
        self._add(attributes, {**own, "training": module.training})

    def _add(self, mapping: Mapping[str, Any], items: Mapping[str, Any] | None = None) -> None:
        self._sizes.append((mapping, len(mapping)))
        for name, value in (mapping if items is None else items).items():
            self._items.append((mapping, name, value))
            if not isinstance(value, Tensor):
                continue
            # Sparse tensors and those of other libraries have no memory of their own to compare.
            dense = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
            if value.is_inference() or not dense:
                self.comparable = False
            else:
                self._tensors.append((value, value._version, value.data_ptr()))
                self._memory.append(value.untyped_storage())

    @classmethod
    def count_optimizer_step(cls, *_: object) -> None:
        """Outdate all snapshots."""
        cls._optimizer_steps += 1


# Fused optimizers write to parameters without counting versions.
register_optimizer_step_post_hook(Snapshot.count_optimizer_step)


def resident_bytes(model: nn.Module) -> int:
    """Count the bytes of memory that a network holds between two calls, each tensor's memory once.

    Parameters, buffers and what parametrizations store, and the matrices that `Folding` modules keep: call it
    after a forward pass, which computes these.
    """
    sizes: dict[int, int] = {}
    packed = 0
    kept = (tensor for m in model.modules() if isinstance(m, Folding) for tensor in m.kept_tensors())
    for tensor in itertools.chain(model.parameters(), model.buffers(), kept):
        if tensor.is_mkldnn:  # has no storage of its own to ask; the layout may pad it a little
            packed += tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return packed + sum(sizes.values())


#: Attributes that every module has, such as the dictionaries of its parameters and hooks.
_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_UNCHANGEABLE = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)


class Layout(NamedTuple):
    """Form of the matrices that inference keeps.

    Attributes:
        dtype: precision of the matrix products, None for that of the weights.
        packed: whether matrices take the layout of `kernels.linear.pack`.
        keeps_stored: whether those of weights that are stored in fewer bytes are kept, too.
    """

    dtype: torch.dtype | None
    packed: bool
    keeps_stored: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        """Round and pack `weight [out, in]`."""
        rounded = weight.to(self.dtype or weight.dtype)
        return pack(rounded) if self.packed else rounded


class _Kept:
    """Matrices that a module keeps; empty in copies of the module, since packed ones cannot be copied."""

    def __init__(self, layout: Layout | None = None) -> None:
        self.layout = layout
        self.values: dict[str, Any] = {}
        self.snapshots: dict[str, Snapshot] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


class Folding(nn.Module):
    """Module that can keep matrices computed from its weights, and those of its children, for inference.

    They are computed when a forward pass without gradients first needs them, and again after any change of
    the weights. `train()` ends it; copies start without.

    Of weights that are stored in fewer bytes (`model.parametrizations`) nothing is kept: the matrices are
    computed by every pass and freed after it, because they would take the memory that the form saves. Layouts
    with `keeps_stored`, which are for speed, are the exception.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept = _Kept()

    def fold(self, layout: Layout) -> None:
        """Keep matrices in this form from the next forward pass without gradients on."""
        self._kept = _Kept(layout)

    def prepare(self, form: str, layout: Layout) -> Any:
        """Compute the matrices `form` from the present weights; without gradients and autocast."""
        raise NotImplementedError

    def folded(self, form: str = "all") -> Any:
        """Give the matrices `form` of the present weights, or None where the weights are to be read.

        They are not used with gradients, nor where autocast asks for products in another precision.
        """
        kept = self._kept
        if kept.layout is None or torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            # Compiled code cannot see versions: `refresh` looks before it runs.
            value = None if kept.layout.packed else kept.values.get(form)
        elif self._is_compact():
            value = self._computed(form, kept.layout._replace(packed=False))
        else:
            value = self.refresh(form)
        if value is None:
            return None
        dtype = kept.layout.dtype or value.bias.dtype
        return value if dtype == cast_to_autocast(value.bias[:0])[0].dtype else None

    def refresh(self, form: str = "all") -> Any:
        """As `folded`, in any precision; nothing is computed where nothing has changed."""
        kept, snapshot = self._kept, self._kept.snapshots.get(form)
        if kept.layout is None or self._is_compact():
            return None
        if snapshot is None or not snapshot.is_current():
            # Before the weights are read: what changes in the meantime is noticed by the next call.
            snapshot, value = Snapshot(self), None
            if snapshot.comparable:
                value = self._computed(form, kept.layout)
            # In this order: another thread that finds the snapshot finds its matrices, too.
            kept.values[form], kept.snapshots[form] = value, snapshot
        return kept.values[form]

    def kept_tensors(self) -> Iterator[Tensor]:
        """Go through the tensors of the matrices that are kept, those of packed ones too."""
        pending: list[Any] = list(self._kept.values.values())
        while pending:
            item = pending.pop()
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, list | tuple):
                pending += item

    def _is_compact(self) -> bool:
        layout = self._kept.layout
        if layout is not None and layout.keeps_stored:
            return False
        return any(getattr(module, "is_compact", False) for module in self.modules())

    @property
    def layout(self) -> Layout | None:
        """Form of the kept matrices; None where none are kept."""
        return self._kept.layout

    def _computed(self, form: str, layout: Layout) -> Any:
        with torch.inference_mode(False), torch.no_grad(), _own_precision(self):
            return self.prepare(form, layout)

    def train(self, mode: bool = True) -> "Folding":
        """Set the mode; weights of a network in training change, and nothing is kept of them."""
        if mode:
            self._kept = _Kept()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "Folding":
        # The former device's memory is free at once.
        self._kept = _Kept(self._kept.layout)
        return super()._apply(fn, recurse)


def folded_in_bf16(root: nn.Module) -> bool:
    """Tell whether matrices below `root` are folded in bfloat16."""
    layouts = [module.layout for module in root.modules() if isinstance(module, Folding)]
    return any(layout is not None and layout.dtype == torch.bfloat16 for layout in layouts)

"""Norms of what every expert adds to the outputs of a network's layers, for REAP's scores."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric.data import Data

from equiformer2.errors import InputError
from equiformer2.experts.composition import composition_of
from equiformer2.experts.network import ExpertNetwork


def expert_outputs(network: ExpertNetwork, structures: Sequence[Data], task: str) -> Tensor:
    """Measure what each expert, times its coefficient, adds to the outputs of attention and feed-forward.

    A layer is computed once more without each of the experts, from the same input: for one matrix, the change
    is the expert's output. Norms are relative to that of the layer's output, so that layers count equally.

    Args:
        network: the mixture.
        structures: at least one; labels are not read.
        task: name.

    Returns:
        `[structures, K]` means over the layers.

    Raises:
        InputError: an unknown task, or no structures.
    """
    if not structures:
        raise InputError("the outputs of experts are measured on structures, and there are none")
    stacks = {name: stack.detach() for name, stack in network.expert_weights().items()}
    rows = []
    for structure in structures:
        composition = composition_of(structure, network.config.max_num_elements)[0]
        with torch.no_grad():
            coefficients = network.coefficients(structure, task)[0]
        plain = network.merged(task, composition)
        found: list[Tensor] = []
        with ExitStack() as hooks, torch.no_grad():
            for path, names in _layers(stacks).items():
                parts = {name.removeprefix(f"{path}."): stacks[name] for name in names}
                hook = _Without(parts, coefficients, found)
                handle = plain.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            plain(structure)
        rows.append(torch.stack(found).mean(0))
    return torch.stack(rows)


def _layers(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group weights by the module that is called: `blocks.0.ga`, `blocks.0.ffn`, `force_block`."""
    layers: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        layers.setdefault(".".join(parts[: 3 if parts[0] == "blocks" else 1]), []).append(name)
    return layers


class _Without:
    """Forward hook that computes a layer again without each expert.

    Args:
        stacks: `[K, …]` by the weight's name within the layer.
        coefficients: `[K]`.
        found: gets the norms `[K]`.
    """

    def __init__(self, stacks: Mapping[str, Tensor], coefficients: Tensor, found: list[Tensor]) -> None:
        self.stacks, self.coefficients, self.found = stacks, coefficients, found
        self._busy = False

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Measure, unless it is this hook that calls the layer."""
        if self._busy:
            return
        self._busy = True
        try:
            whole = self._tensor(output)
            merged = {name: module.get_parameter(name) for name in self.stacks}
            changes = []
            for expert, coefficient in enumerate(self.coefficients):
                weights = {name: merged[name] - coefficient * self.stacks[name][expert] for name in merged}
                changes.append((whole - self._tensor(functional_call(module, weights, args, kwargs))).norm())
        finally:
            self._busy = False
        self.found.append(torch.stack(changes) / whole.norm().clamp(min=1e-30))

    @staticmethod
    def _tensor(output: Any) -> Tensor:
        """Output of a layer; attention gives its messages with the observed weights."""
        return output if isinstance(output, Tensor) else output.messages  # type: ignore[no-any-return]

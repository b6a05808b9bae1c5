"""Weights that are sums of experts, and weights of which every task has its own (parametrizations).

A weight W of the plain network is kept as a stack of K weights `[K, *W.shape]`, and is

    W = sum_e c_e W_e

for the coefficients c `[K]` of the present forward pass (a mixture of linear experts, as in UMA, 2506.23971).
The parts that give the energy are kept as stacks `[T, ...]`, one entry per task. The sum of weights of one
shape has the symmetry of each of them, so equivariance is that of the plain network.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equiformer2.errors import InputError
from equiformer2.kernels.chunks import no_autocast
from equiformer2.model.feed_forward import FeedForwardNetwork, SwiGLUFeedForwardNetwork
from equiformer2.model.parametrizations import find_weight, register
from equiformer2.model.so2_convolution import SO2Convolution
from equiformer2.model.so3_linear import SO3Linear

_ENERGY_HEAD = "energy_block"
_NO_CHOICE = (
    "the weights of an expert network have values in its own forward pass alone: call the ExpertNetwork, or "
    "merge it for a task and a composition"
)


class ExpertChoice(nn.Module):
    """Coefficients and task of the forward pass that is going on, which the stacks of one network share.

    It belongs to one network, so that networks in other threads have their own. `folding.Snapshot` sees its
    values, so that matrices kept for inference are made again when they change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coefficients: Tensor | None = None
        self.task: int | None = None
        self.mixed: Mapping[int, Tensor] | None = None
        self._last: Tensor | None = None

    def use(self, coefficients: Tensor, task: int, mixed: Mapping[int, Tensor] | None = None) -> None:
        """Set what weights are from now on.

        Args:
            coefficients: `[K]`.
            task: number.
            mixed: sums with these coefficients by the `id` of their stacks, where they are known already.
        """
        self.mixed = mixed
        if torch.is_grad_enabled():
            self.coefficients, self.task = coefficients, task
            return
        # Matrices that are kept for equal coefficients stay: the tensor is compared by identity.
        before = self._last
        if before is None or before.device != coefficients.device or not torch.equal(before, coefficients):
            with torch.inference_mode(False):
                self._last = coefficients.detach().clone()
        self.coefficients, self.task = self._last, task

    def clear(self) -> None:
        """End the pass: no graph of gradients is kept alive, and nothing runs with the values of this one."""
        self.coefficients, self.task, self.mixed = None, None, None


class StackedWeight(nn.Module):
    """Weight that a stack gives in the forward pass: the sum of its experts, or the entry of the task.

    Args:
        choice: of the network.
        of_task: the stack is `[T, *shape]` and has one entry per task; else it is `[K, *shape]`, of experts.
    """

    def __init__(self, choice: ExpertChoice, of_task: bool) -> None:
        super().__init__()
        self.choice, self.of_task = choice, of_task

    def forward(self, stack: Tensor) -> Tensor:
        """Make the weight `[*shape]`.

        Raises:
            InputError: no forward pass of the expert network is going on.
        """
        choice = self.choice
        if choice.coefficients is None or choice.task is None:
            raise InputError(_NO_CHOICE)
        if self.of_task:
            return stack[choice.task]
        return mix(stack, choice.coefficients) if choice.mixed is None else choice.mixed[id(stack)]


def mix(experts: Tensor, coefficients: Tensor) -> Tensor:
    """Sum `experts [K, *shape]` with `coefficients [K]` or `[G, K]`, in the precision of the experts."""
    with no_autocast(experts):
        return torch.tensordot(coefficients.to(experts.dtype), experts, dims=1)


def mixed_weights(model: nn.Module) -> list[str]:
    """List the weights that experts are made of: those of SO(2) convolutions and feed-forward networks.

    Biases and the energy head are not among them.

    Args:
        model: the network, parametrized or not.
    """
    return sorted(
        f"{path}.{name}.weight"
        for path, module in model.named_modules()
        if path != _ENERGY_HEAD
        for name in _weights_of(module)
    )


def _weights_of(module: nn.Module) -> Iterator[str]:
    """Go through the paths of the linear maps of an SO(2) convolution or a feed-forward network."""
    if isinstance(module, SO2Convolution):
        yield "fc_m0"
        yield from (f"so2_m_conv.{number}.fc" for number in range(len(module.so2_m_conv)))
    elif isinstance(module, FeedForwardNetwork | SwiGLUFeedForwardNetwork):
        for path, part in module.named_modules():
            if isinstance(part, nn.Linear | SO3Linear):
                yield path


def task_parameters(model: nn.Module) -> list[str]:
    """List the parameters that every task has for itself: those of the energy head.

    Args:
        model: the plain network.
    """
    return [name for name, _ in model.named_parameters() if name.startswith(f"{_ENERGY_HEAD}.")]


def attach_stacks(
    model: nn.Module, choice: ExpertChoice, experts: Mapping[str, Tensor], heads: Mapping[str, Tensor]
) -> None:
    """Put stacks in the place of weights of a plain network.

    Args:
        model: changed in place; parameters that are held stay so.
        choice: to be shared by the stacks.
        experts: `[K, *shape]` by the names of the weights.
        heads: `[T, *shape]` by the names of the parameters.

    Raises:
        InputError: there is no such weight, or it has another shape.
    """
    for stacks, of_task in ((experts, False), (heads, True)):
        for name, stack in stacks.items():
            module, leaf = find_weight(model, name, stack.shape[1:])
            weight = getattr(module, leaf)
            values = stack.detach().to(weight.device, weight.dtype)
            setattr(module, leaf, nn.Parameter(values, requires_grad=weight.requires_grad))
            register(module, leaf, StackedWeight(choice, of_task), unsafe=True)


def stacks_of(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Find the stacks of a network by the names of the weights in the plain network.

    Returns:
        Experts `[K, *shape]`, and what tasks have for themselves, `[T, *shape]`.
    """
    experts: dict[str, nn.Parameter] = {}
    heads: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            owner, _, name = path.rpartition(".parametrizations.")
            if isinstance(weight := module[0], StackedWeight):
                assert isinstance(module.original, nn.Parameter)
                found = heads if weight.of_task else experts
                found[f"{owner}.{name}"] = module.original
    return experts, heads

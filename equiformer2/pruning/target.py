"""How far a plan reduces a network: in operations, parameters or measured time."""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.config import ModelConfig
from equiformer2.pruning.macs import count_macs
from equiformer2.pruning.parameters import count_parameters
from equiformer2.pruning.plan import PruningPlan
from equiformer2.pruning.shrink import shrink


class Target(Protocol):
    """What a search for a plan works towards; all fractions are of the network that it starts from.

    Attributes:
        fraction: what is wanted, above 0 and below 1.
    """

    fraction: float

    def fraction_of(self, plan: PruningPlan) -> float:
        """What `plan` leaves."""

    def reached(self, plan: PruningPlan) -> bool:
        """Whether `plan` leaves no more than `fraction`."""


class _Counted(ABC):
    """Base of targets that are counted from the configuration."""

    def __init__(self, config: ModelConfig, fraction: float) -> None:
        self.fraction = _checked(fraction)
        self._config = config
        self._dense = self._count(config)

    @abstractmethod
    def _count(self, config: ModelConfig) -> int:
        """Of the whole network."""

    def fraction_of(self, plan: PruningPlan) -> float:
        """What `plan` leaves; 1 for a plan that keeps everything."""
        return self._count(plan.applied_to(self._config)) / self._dense

    def reached(self, plan: PruningPlan) -> bool:
        """Whether `plan` leaves no more than `fraction`."""
        return self.fraction_of(plan) <= self.fraction


class MacTarget(_Counted):
    """Multiply-accumulate operations on a graph of `atoms` atoms and `edges` edges (see `macs`)."""

    def __init__(self, config: ModelConfig, fraction: float, atoms: int, edges: int) -> None:
        if atoms < 1 or edges < 0:
            raise InputError(f"a graph cannot have {atoms} atoms and {edges} edges")
        self._graph = atoms, edges
        super().__init__(config, fraction)

    def _count(self, config: ModelConfig) -> int:
        return count_macs(config, *self._graph).total


class ParameterTarget(_Counted):
    """Parameters."""

    def _count(self, config: ModelConfig) -> int:
        return count_parameters(config)


class LatencyTarget:
    """Time of a forward pass without gradients, measured where and as the network is.

    The pruned and the unpruned network run in turn, so that a slow moment of the machine meets both; what
    counts is the median of the ratios of neighbouring runs. A plan is measured once.

    Args:
        model: the network; it is copied.
        batch: what it runs on, on the device of the model.
        fraction: of the time of `model`.
        repeats: pairs of runs.
        warm_up: runs of both before.
    """

    def __init__(
        self,
        model: EquiformerV2,
        batch: Batch | Data,
        fraction: float,
        repeats: int = 15,
        warm_up: int = 2,
    ) -> None:
        self.fraction = _checked(fraction)
        if repeats < 1 or warm_up < 0:
            raise InputError("latency needs at least one repeat, and no negative warm_up")
        self._model, self._batch = model, batch
        self._repeats, self._warm_up = repeats, warm_up
        self._graph = model.build_graph(batch)
        self._measured: dict[PruningPlan, float] = {}

    def fraction_of(self, plan: PruningPlan) -> float:
        """Median ratio of times, `plan`'s network to the unpruned one."""
        plan = plan.checked(self._model.config)
        if plan not in self._measured:
            self._measured[plan] = self._measure(plan)
        return self._measured[plan]

    def reached(self, plan: PruningPlan) -> bool:
        """Whether the pruned network takes no more than `fraction` of the time."""
        return self.fraction_of(plan) <= self.fraction

    def _measure(self, plan: PruningPlan) -> float:
        dense, small = (self._runner(each) for each in (PruningPlan.keep_all(self._model.config), plan))
        for _ in range(self._warm_up):
            dense(), small()
        return statistics.median(small() / dense() for _ in range(self._repeats))

    def _runner(self, plan: PruningPlan) -> Callable[[], float]:
        """A function that runs the network of `plan` once, prepared as for inference; it returns seconds."""
        network = shrink(self._model, plan)
        network.fold_weights()
        device = network.sphere_embedding.weight.device

        def run() -> float:
            with torch.no_grad():
                _wait(device)
                start = time.perf_counter()
                network(self._batch, graph=self._graph)
                _wait(device)
                return time.perf_counter() - start

        return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _checked(fraction: float) -> float:
    if not 0 < fraction < 1:
        raise InputError(f"the target is {fraction}; it must be a fraction above 0 and below 1")
    return fraction

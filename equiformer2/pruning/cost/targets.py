"""How far a plan reduces a network: in operations, parameters or measured time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch_geometric.data import Batch, Data

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.config import ModelConfig
from equiformer2.model.parameters import count_parameters
from equiformer2.pruning.cost.operations import count_macs
from equiformer2.pruning.cost.time_table import PartTimer, TimeTable
from equiformer2.pruning.structured.apply import shrink
from equiformer2.pruning.structured.plan import PruningPlan


class Target(Protocol):
    """What a search for a plan works towards; all fractions are of the network that it starts from.

    Attributes:
        quantity: its name on the command line.
        fraction: what is wanted, above 0 and below 1.
    """

    quantity: str
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

    quantity = "macs"

    def __init__(self, config: ModelConfig, fraction: float, atoms: int, edges: int) -> None:
        if atoms < 1 or edges < 0:
            raise InputError(f"a graph cannot have {atoms} atoms and {edges} edges")
        self._graph = atoms, edges
        super().__init__(config, fraction)

    def _count(self, config: ModelConfig) -> int:
        return count_macs(config, *self._graph).total


class ParameterTarget(_Counted):
    """Parameters."""

    quantity = "parameters"

    def _count(self, config: ModelConfig) -> int:
        return count_parameters(config)


class LatencyTarget:
    """Time of a force call without gradients, added up from measured parts (see `time_table`).

    Args:
        model: the network; it is left as it is.
        batch: what it runs on, on the device of the model.
        fraction: of the time of `model`.
        path: where the table of times is kept, and read from if it exists; None keeps it in memory.
        threads: of torch while measuring; None for those it has.
        repeats: pairs of runs per measurement.
        warm_up: runs of both before.

    Raises:
        InputError: `path` holds times of something else.
    """

    quantity = "latency"

    def __init__(
        self,
        model: EquiformerV2,
        batch: Batch | Data,
        fraction: float,
        path: AnyPath | None = None,
        threads: int | None = None,
        repeats: int = 15,
        warm_up: int = 2,
    ) -> None:
        path = None if path is None else Path(path)
        self.fraction, self._model = _checked(fraction), model
        self._timer = PartTimer(model, batch, threads, repeats, warm_up)
        self._table = TimeTable(model.config, self._timer, path, self._timer.facts)

    def fraction_of(self, plan: PruningPlan) -> float:
        """What the parts that `plan` leaves take, and the rest of the network."""
        return self._table.fraction_of(plan)

    def reached(self, plan: PruningPlan) -> bool:
        """Whether `plan` leaves no more than `fraction`."""
        return self.fraction_of(plan) <= self.fraction

    def measured(self, plan: PruningPlan) -> float:
        """Time of the whole pruned network over that of the unpruned one: median ratio of runs in turn."""
        plans = plan, PruningPlan.keep_all(self._model.config)
        small, dense = (self._timer.whole(shrink(self._model, each)) for each in plans)
        return self._timer.compare(small, dense)


class CombinedTarget:
    """Several targets as one cost: the sum of what is left, each counted down to its target.

    A cut is worth what it saves of the targets that are not reached yet. With one target the cost is its
    share.

    Attributes:
        target: the cost at which all are reached.
        wanted: quantity -> share; what tells this target from others of the same cost.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        if not targets:
            raise InputError("there is no target: give at least one")
        self._targets = targets
        self.target = sum(target.fraction for target in targets)
        self.wanted = {target.quantity: target.fraction for target in targets}

    def cost(self, plan: PruningPlan) -> float:
        """Above `target` as long as one is missed; below it by what the nearest one is passed by."""
        shares = [(target.fraction_of(plan), target.fraction) for target in self._targets]
        if any(left > wanted for left, wanted in shares):
            return sum(max(left, wanted) for left, wanted in shares)
        return self.target + max(left - wanted for left, wanted in shares)


def _checked(fraction: float) -> float:
    if not 0 < fraction < 1:
        raise InputError(f"the target is {fraction}; it must be a fraction above 0 and below 1")
    return fraction

"""Targets of a plan: shares of operations, parameters or measured time that stay.

All shares are of the network that the plan applies to. A search needs one number per plan: `CombinedTarget`
makes one cost of several targets.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch_geometric.data import Batch, Data

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.config import ModelConfig
from equiformer2.model.parameters import count_parameters
from equiformer2.pruning.cost.operations import Plan, count_macs
from equiformer2.pruning.cost.time_table import PartTimer, TimeTable


class Target(ABC):
    """Share of one quantity that a plan leaves, and the share that it is to leave.

    Args:
        fraction: share that is to stay, above 0 and below 1.

    Attributes:
        quantity: name of the quantity on the command line.
        fraction: share that is to stay.

    Raises:
        InputError: `fraction` is not between 0 and 1.
    """

    quantity: str

    def __init__(self, fraction: float) -> None:
        if not 0 < fraction < 1:
            raise InputError(f"the target is {fraction}; it must be a fraction above 0 and below 1")
        self.fraction = fraction

    @abstractmethod
    def fraction_of(self, plan: Plan) -> float:
        """Return the share that `plan` leaves; 1 for a plan that keeps everything."""

    def reached(self, plan: Plan) -> bool:
        """Return True if `plan` leaves no more than `fraction`."""
        return self.fraction_of(plan) <= self.fraction


class MacTarget(Target):
    """Share of the multiply-accumulate operations (see `operations`).

    Args:
        config: configuration of the network.
        fraction: share of its operations that is to stay.
        atoms: number of atoms that operations are counted for.
        edges: number of their directed edges.

    Raises:
        InputError: `fraction` is not between 0 and 1, or there are no atoms.
    """

    quantity = "macs"

    def __init__(self, config: ModelConfig, fraction: float, atoms: int, edges: int) -> None:
        super().__init__(fraction)
        if atoms < 1 or edges < 0:
            raise InputError(f"a graph cannot have {atoms} atoms and {edges} edges")
        self._config, self._graph = config, (atoms, edges)
        self._dense = count_macs(config, atoms, edges).total

    def fraction_of(self, plan: Plan) -> float:
        """Return the share of the operations that `plan` leaves."""
        return count_macs(plan.applied_to(self._config), *self._graph).total / self._dense


class ParameterTarget(Target):
    """Share of the parameters.

    Args:
        config: configuration of the network.
        fraction: share of its parameters that is to stay.

    Raises:
        InputError: `fraction` is not between 0 and 1.
    """

    quantity = "parameters"

    def __init__(self, config: ModelConfig, fraction: float) -> None:
        super().__init__(fraction)
        self._config, self._dense = config, count_parameters(config)

    def fraction_of(self, plan: Plan) -> float:
        """Return the share of the parameters that `plan` leaves."""
        return count_parameters(plan.applied_to(self._config)) / self._dense


class LatencyTarget(Target):
    """Share of the time of a force call without gradients, added up from measured parts (see `time_table`).

    Args:
        model: network to cut; it is left as it is.
        batch: structures of the timed call, on the device of `model`.
        fraction: share of the time of `model` that is to stay.
        path: file that the table of times is read from, if it exists, and written to; None keeps the table
            in memory.
        threads: number of torch's threads while measuring; None leaves it as it is.
        repeats: timed pairs of calls per measurement.
        warm_up: pairs of calls before them.

    Raises:
        InputError: `path` holds times of another network, batch or machine setting.
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
        super().__init__(fraction)
        self._config = model.config
        self._timer = PartTimer(model, batch, threads, repeats, warm_up)
        self._table = TimeTable(
            model.config, self._timer, None if path is None else Path(path), self._timer.facts
        )

    def fraction_of(self, plan: Plan) -> float:
        """Return the share of the time that `plan` leaves, from the table."""
        return self._table.fraction_of(plan)

    def measured(self, plan: Plan) -> float:
        """Time the whole pruned network beside the dense one.

        Returns:
            Median ratio of the times of neighbouring calls, pruned / dense.
        """
        return self._timer.whole_ratio(plan.applied_to(self._config))


class CombinedTarget:
    """Several targets as one cost: the sum of the shares that stay, each counted down to its target.

    A cut is worth what it saves of the targets that are not reached yet. With one target the cost is its
    share.

    Args:
        targets: at least one.

    Attributes:
        target: cost at which all targets are reached.
        shares: quantity -> share that is to stay; tells this target from others of the same cost.

    Raises:
        InputError: there are no targets.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        if not targets:
            raise InputError("there is no target: give at least one")
        self._targets = targets
        self.target = sum(target.fraction for target in targets)
        self.shares = {target.quantity: target.fraction for target in targets}

    def cost(self, plan: Plan) -> float:
        """Return the cost of `plan`.

        It is above `target` as long as one target is missed, and below it by the smallest margin once all
        are reached.
        """
        shares = [(target.fraction_of(plan), target.fraction) for target in self._targets]
        if any(left > limit for left, limit in shares):
            return sum(max(left, limit) for left, limit in shares)
        return self.target + max(left - limit for left, limit in shares)


def parse_targets(texts: Sequence[str], examples: Mapping[str, float]) -> dict[str, float]:
    """Read targets such as `macs=0.5`.

    Args:
        texts: one per target.
        examples: the quantities that are known, each with a share for the error message.

    Returns:
        By quantity the share of the dense network that stays.

    Raises:
        InputError: another quantity or a share that is none, or a quantity given twice.
    """
    shares: dict[str, float] = {}
    for text in texts:
        quantity, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if quantity not in examples or not 0 < share < 1 or quantity in shares:
            *first, last = (f"{name}={value:g}" for name, value in examples.items())
            raise InputError(
                f"the target {text!r} is not understood: give {', '.join(first)} or {last}, shares of the "
                "dense network, each at most once"
            )
        shares[quantity] = share
    return shares

"""What a schedule costs and how far it takes the network from the dense one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.routing.achieved import Achieved, Recorder
from equiformer2.pruning.routing.router import Router


class RoutedModel:
    """A network under a router, called like a network; counts what it computes.

    Args:
        model: the network.
        router: what decides.
    """

    def __init__(self, model: EquiformerV2, router: Router) -> None:
        self.model, self.recorder = model, Recorder(router)

    def __call__(self, batch: Batch, graph: RadiusGraph | None = None) -> Mapping[str, Tensor]:
        """Energies and forces."""
        return self.recorder(self.model, batch, graph)

    def achieved(self) -> Achieved:
        """Of all calls so far."""
        return self.recorder.achieved(self.model.config)


@dataclasses.dataclass
class ScheduleObjective:
    """`evaluate` of `search_schedule`: discrepancy to the dense network and MACs, without labels.

    Attributes:
        model: the network.
        calibration: structures with the dense network's answers.
        make_router: from levels to a router, for instance `StaticRouter` or a trained router with new levels.
    """

    model: EquiformerV2
    calibration: Calibration
    make_router: Callable[[Sequence[float]], Router]

    def __call__(self, levels: Sequence[float]) -> tuple[float, float]:
        """Loss (eV) and fraction of the dense MACs."""
        routed = RoutedModel(self.model, self.make_router(levels))
        loss = self.calibration.loss(routed)
        return loss, routed.achieved().macs


def with_levels(router: Router, levels: Sequence[float | None], **changes: Any) -> Router:
    """The same router with other levels."""
    return type(router)(**router.settings() | {"levels": list(levels)} | changes)

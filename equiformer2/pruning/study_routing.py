"""Routers as methods of a study: the same held-out systems, the same questions, MACs by structure."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from torch_geometric.data import Batch

from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.held_out import HeldOut
from equiformer2.pruning.latency import compare_latency
from equiformer2.pruning.routing import (
    ROUTING_METHODS,
    RoutedModel,
    RoutingSettings,
    TargetMissedError,
    find_router,
)
from equiformer2.pruning.routing.files import router_to_dict
from equiformer2.pruning.routing.find import CONTEXT_ONLY

PREFIX = "route_"
ROUTED = tuple(PREFIX + name for name in ROUTING_METHODS)
NO_BUDGET = PREFIX + CONTEXT_ONLY
"""What it leaves is decided by the structures: one result, whatever the budgets and seeds."""


def routed_result(
    method: str,
    keep: float,
    seed: int,
    model: EquiformerV2,
    calibration: Calibration,
    held_out: list[HeldOut],
    settings: RoutingSettings,
    state_path: Path,
    repeats: int,
) -> dict[str, Any]:
    """The record of one router, in the form of `Study`.

    `macs` is the share on the calibration structures; `macs_on` has it for each held-out set, where it
    differs. Where no schedule comes near `keep`, there is only `missed`, the reason.
    """
    record: dict[str, Any] = {"method": method, "keep": keep, "seed": seed}
    try:
        router, found = find_router(
            method.removeprefix(PREFIX),
            model,
            calibration,
            None if method == NO_BUDGET else keep,
            settings,
            seed=seed,
            state_path=state_path,
            progress=False,
        )
    except TargetMissedError as error:
        return record | {"missed": str(error)}
    routed = RoutedModel(model, router)
    loss = calibration.loss(routed)
    achieved = {"calibration": routed.achieved()}
    errors = {}
    for part in held_out:
        routed = RoutedModel(model, router)
        errors[part.name] = part.errors(routed)
        achieved[part.name] = routed.achieved()
    batch = Batch.from_data_list(held_out[0].calibration.structures[:1])
    ready = deepcopy(model).requires_grad_(False)
    ready.fold_weights()
    latency = compare_latency(lambda: router(ready, batch), lambda: ready(batch), repeats)
    return record | {
        "macs": achieved["calibration"].macs,
        "macs_on": {part.name: achieved[part.name].macs for part in held_out},
        "parameters": 1.0,
        "latency": latency.to_dict(),
        "search": found,
        "router": router_to_dict(router),
        "achieved": {name: counts.to_dict() for name, counts in achieved.items()},
        "calibration_loss": loss,
        "cut": errors,
        "distilled": None,
    }

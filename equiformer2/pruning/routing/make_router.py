"""From a checkpoint and data to a router and a report of it: what `equiformer2 prune route` calls."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.pruning.calibration import FORCE_WEIGHT, Calibration
from equiformer2.pruning.calibration_data import read_structures
from equiformer2.pruning.routing import Achieved, BaseRouter, RoutedModel, RoutingSettings, find_router


@dataclass(frozen=True)
class RouteRequest:
    """What to make a router for.

    Attributes:
        checkpoint: of the network.
        data: structures to calibrate and train on, as in `read_structures`; labels are not read.
        method: of `routing.ROUTING_METHODS`.
        target: `macs=F` with the share F that stays; None for `context_only`.
        settings: of the search and the training.
        weights: `raw` or `averaged`; None for the averaged ones where there are any.
        structures: how many to calibrate on.
        force_weight: λ of the loss, Å.
        batch_size: structures per forward pass.
        device: to compute on.
        seed: of the choice of structures and of everything drawn.
    """

    checkpoint: str
    data: tuple[str, ...]
    method: str
    target: str | None = None
    settings: RoutingSettings = field(default_factory=RoutingSettings)
    weights: str | None = None
    structures: int = 32
    force_weight: float = FORCE_WEIGHT
    batch_size: int = 8
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class MadeRouter:
    """A router and what it does on the calibration structures.

    Attributes:
        router: the router.
        achieved: atoms, edges and MACs that it leaves.
        errors: against the dense network (`Discrepancy.averages`).
        found: how it was found.
    """

    router: BaseRouter
    achieved: Achieved
    errors: dict[str, float | None]
    found: dict[str, Any]

    def to_dict(self, request: RouteRequest) -> dict[str, Any]:
        """The report, for JSON."""
        return {
            "request": asdict(request),
            "achieved": self.achieved.to_dict(),
            "errors": self.errors,
            "found": self.found,
        }

    def __str__(self) -> str:
        errors = (
            ("force MAE", self.errors["force_mae"], "eV/Å"),
            ("energy", self.errors["energy_per_atom"], "eV/atom"),
            ("loss", self.errors["loss"], "eV"),
        )
        told = ", ".join(f"{name} {value:.4f} {unit}" for name, value, unit in errors if value is not None)
        return f"{self.achieved}\nagainst the dense network, calibration structures: {told}"


def make_router(
    request: RouteRequest, state_path: AnyPath | None = None, progress: bool = True
) -> MadeRouter:
    """Make the router; search and training continue from `state_path` where there is one.

    Raises:
        InputError: a target that is not understood or cannot be reached, an unknown method.
        datasets_oc20.DataError: data that cannot be read.
    """
    state_path = None if state_path is None else Path(state_path)
    target = None if request.target is None else _parse_target(request.target)
    checkpoint = load_checkpoint(request.checkpoint, request.weights, device=request.device)
    model = checkpoint.model.eval()
    structures = read_structures(request.data, request.structures, request.seed)
    calibration = Calibration(
        model, checkpoint.normalizers, structures, request.batch_size, request.force_weight
    )
    router, found = find_router(
        request.method,
        model,
        calibration,
        target,
        request.settings,
        seed=request.seed,
        state_path=state_path,
        progress=progress,
    )
    routed = RoutedModel(model, router)
    errors = calibration.discrepancy(routed).averages()
    return MadeRouter(router, routed.achieved(), errors, found)


def _parse_target(text: str) -> float:
    quantity, _, number = text.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = float("nan")
    if quantity != "macs" or not 0 < share < 1:
        raise InputError(f"the target {text!r} is not understood: give a share of the MACs, such as macs=0.7")
    return share

"""Make a router from a checkpoint and data, with a report of it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.pruning.calibration import FORCE_WEIGHT, Calibration
from equiformer2.pruning.calibration_data import mixed_systems, read_structures
from equiformer2.pruning.routing.computed_shares import ComputedShares
from equiformer2.pruning.routing.router import BaseRouter
from equiformer2.pruning.routing.router_search import RoutingSettings, find_router
from equiformer2.pruning.routing.schedule_objective import RoutedModel

_ROUNDING = 1e-6


@dataclass(frozen=True)
class RouteRequest:
    """Order of a router: network, calibration structures, target and method.

    Attributes:
        checkpoint: file of the network.
        data: files of calibration structures, as in `read_structures`; labels are not read.
        method: name of the method, of `routing.ROUTING_METHODS`.
        target: `macs=F` with the share F that stays; None for `context_only`.
        settings: settings of the search and the training.
        weights: `raw` or `averaged`; None for the averaged ones where there are any.
        structures: number of calibration structures.
        force_weight: λ of the loss, Å.
        batch_size: structures per forward pass.
        device: device to compute on.
        seed: random seed, also of the choice of structures.
    """

    checkpoint: str
    data: tuple[str, ...]
    method: str
    target: str | None = None
    settings: RoutingSettings = field(default_factory=RoutingSettings)
    weights: str | None = None
    structures: int = 32
    force_weight: float = FORCE_WEIGHT
    batch_size: int = 2
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class RouteResult:
    """Router with its costs and errors on the calibration structures; as text, a table by block.

    Attributes:
        router: the router.
        shares: shares of atoms, edges and MACs that it leaves.
        errors: errors against the dense network (`Discrepancy.averages`).
        search: record of the search (`find_router`).
        missed: sentence about a target that it misses; None if it does not. Thresholds, into which budgets
            are made, and gates that are open in part leave other shares than the search had.
    """

    router: BaseRouter
    shares: ComputedShares
    errors: dict[str, float | None]
    search: dict[str, Any]
    missed: str | None = None

    def to_dict(self, request: RouteRequest) -> dict[str, Any]:
        """Return the report with its request, plain values for JSON."""
        return {
            "request": asdict(request),
            "achieved": self.shares.to_dict(),
            "errors": self.errors,
            "found": self.search,
            "missed": self.missed,
        }

    def __str__(self) -> str:
        errors = (
            ("force MAE", self.errors["force_mae"], "eV/Å"),
            ("energy", self.errors["energy_per_atom"], "eV/atom"),
            ("loss", self.errors["loss"], "eV"),
        )
        text = ", ".join(f"{name} {value:.4f} {unit}" for name, value, unit in errors if value is not None)
        lines = [str(self.shares), f"against the dense network, calibration structures: {text}"]
        passes = [found["passes"] for found in self.search.values() if "passes" in found]
        if passes:
            lines.append(f"the search took {sum(passes):,.0f} passes of the dense network over one structure")
        if self.missed is not None:
            lines.append(f"missed: {self.missed}")
        return "\n".join(lines)


def make_router(
    request: RouteRequest, state_path: AnyPath | None = None, progress: bool = True
) -> RouteResult:
    """Find the router of a request.

    Args:
        request: network, data, target and method.
        state_path: file of the search's and the training's state, from which they continue; None keeps none.
        progress: show progress bars.

    Returns:
        The router with its costs and errors.

    Raises:
        InputError: a target that is not understood or cannot be reached, an unknown method.
        datasets_oc20.DataError: data that cannot be read.
    """
    state_path = None if state_path is None else Path(state_path)
    target = None
    if request.target is not None:
        quantity, _, number = request.target.partition("=")
        try:
            target = float(number)
        except ValueError:
            target = float("nan")
        if quantity != "macs" or not 0 < target < 1:
            raise InputError(
                f"the target {request.target!r} is not understood: give a share of the MACs, such as macs=0.7"
            )
    checkpoint = load_checkpoint(request.checkpoint, request.weights, device=request.device)
    model = checkpoint.model.eval()
    structures = mixed_systems(read_structures(request.data, request.structures, request.seed), request.seed)
    calibration = Calibration(
        model, checkpoint.normalizers, structures, request.batch_size, request.force_weight
    )
    router, search = find_router(
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
    shares, missed = routed.computed_shares(), None
    if target is not None and shares.macs > target + _ROUNDING:
        missed = (
            f"{shares.macs:.3f} of the MACs are left in the mode {request.settings.mode}, the target is "
            f"{target:g}: give a lower one, or use the mode topk"
        )
    return RouteResult(router, shares, errors, search, missed)

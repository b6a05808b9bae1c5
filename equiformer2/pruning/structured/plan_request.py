"""Make a plan from a checkpoint and data, and a smaller checkpoint from a plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch_geometric.data import Batch

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import load_checkpoint, save_checkpoint
from equiformer2.checkpoint.compact import check_not_stored
from equiformer2.checkpoint.training_data import inherited
from equiformer2.files import check_target
from equiformer2.model.parameters import count_parameters
from equiformer2.pruning.calibration import FORCE_WEIGHT, Calibration
from equiformer2.pruning.calibration_data import mixed_systems, read_structures
from equiformer2.pruning.cost.targets import (
    CombinedTarget,
    LatencyTarget,
    MacTarget,
    ParameterTarget,
    Target,
    parse_targets,
)
from equiformer2.pruning.structured.apply import masked, shrink
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_methods import find_plan

_ANY = 0.5


@dataclass(frozen=True)
class PlanRequest:
    """Order of a plan: network, calibration structures, targets and method.

    Attributes:
        checkpoint: file of the dense network.
        data: files of calibration structures, as in `read_structures`.
        targets: `macs=F`, `parameters=F` or `latency=F` with the share F that stays; all are to be reached.
        method: name of the method, of `plan_methods.METHODS`.
        weights: `raw` or `averaged`; None for the averaged ones where there are any.
        structures: number of calibration structures.
        tries: number of cuts tried per step of a search.
        sphere: let a search cut the channels of the atoms' features.
        importance: importance by which a search ranks units before it tries cuts: `michel` or `taylor`.
        force_weight: λ of the loss, Å.
        batch_size: structures per forward pass.
        device: device to compute on.
        seed: random seed, also of the choice of structures.
    """

    checkpoint: str
    data: tuple[str, ...]
    targets: tuple[str, ...]
    method: str = "multi"
    weights: str | None = None
    structures: int = 32
    tries: int = 8
    sphere: bool = False
    importance: Literal["michel", "taylor"] = "michel"
    force_weight: float = FORCE_WEIGHT
    batch_size: int = 2
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class PlanResult:
    """Plan with its costs and errors; as text, a summary in two or three lines.

    Attributes:
        plan: the plan.
        macs: share of the operations that stays.
        parameters: share of the parameters that stays.
        latency: measured share of the time where that was a target.
        missed: in a sentence, that the whole network takes longer than the target, which the search reached
            by a sum of times of its parts; None if it does not, and for other targets, which are reached.
        errors: errors against the dense network on the calibration structures (`Discrepancy.averages`).
        search: numbers of cuts that a search made and tried, and its work in passes of the dense network;
            empty for a baseline.
    """

    plan: PruningPlan
    macs: float
    parameters: float
    latency: float | None
    missed: str | None
    errors: dict[str, float | None]
    search: dict[str, Any]

    def __str__(self) -> str:
        costs = [f"{self.macs:.1%} of the MACs", f"{self.parameters:.1%} of the parameters"]
        if self.latency is not None:
            costs.append(f"{self.latency:.1%} of the time")
        errors = [
            f"{text} {self.errors[name]:.4f} {unit}"
            for name, text, unit in (
                ("force_mae", "force MAE", "eV/Å"),
                ("energy_per_atom", "energy", "eV/atom"),
                ("loss", "loss", "eV"),
            )
            if self.errors[name] is not None
        ]
        lines = [
            f"stays: {', '.join(costs)}",
            f"against the dense network, calibration structures: {', '.join(errors)}",
        ]
        if self.search:
            lines.append(
                f"search: {self.search['cuts']} steps, {self.search['tried']} cuts tried, the work of "
                f"{self.search['passes']:,.0f} passes of the dense network over one structure"
            )
        if self.missed is not None:
            lines.append(f"missed: {self.missed}")
        return "\n".join(lines)


def make_plan(request: PlanRequest, state_path: AnyPath | None = None, progress: bool = True) -> PlanResult:
    """Find the plan of a request.

    Args:
        request: network, data, targets and method.
        state_path: file of a search's state, from which it continues; the times of a target of latency are
            kept beside it, as `NAME.times.json`. None keeps none.
        progress: show a progress bar.

    Returns:
        The plan with its costs and errors.

    Raises:
        InputError: a target that is not understood or cannot be reached, an unknown method.
        datasets_oc20.DataError: data that cannot be read.
    """
    state_path = None if state_path is None else Path(state_path)
    shares = parse_targets(request.targets, {"macs": 0.5, "parameters": 0.5, "latency": 0.6})
    checkpoint = load_checkpoint(request.checkpoint, request.weights, device=request.device)
    check_not_stored(checkpoint.model, request.checkpoint)
    model = checkpoint.model.eval()
    structures = mixed_systems(read_structures(request.data, request.structures, request.seed), request.seed)
    calibration = Calibration(
        model, checkpoint.normalizers, structures, request.batch_size, request.force_weight
    )
    macs = MacTarget(model.config, shares.get("macs", _ANY), *calibration.size)
    parameters = ParameterTarget(model.config, shares.get("parameters", _ANY))
    targets: dict[str, Target] = {"macs": macs, "parameters": parameters}
    latency = None
    if "latency" in shares:
        first = Batch.from_data_list(calibration.structures[:1]).to(request.device)
        times = None if state_path is None else state_path.with_suffix(".times.json")
        latency = targets["latency"] = LatencyTarget(model, first, shares["latency"], times)
    combined = CombinedTarget([targets[quantity] for quantity in shares])
    plan, search = find_plan(
        request.method,
        model,
        checkpoint.normalizers,
        calibration,
        combined.cost,
        combined.target,
        shares=combined.shares,
        seed=request.seed,
        tries=request.tries,
        sphere=request.sphere,
        importance=request.importance,
        state_path=state_path,
        progress=progress,
    )
    with masked(model, plan):
        errors = calibration.discrepancy(model).averages()
    time = None if latency is None else latency.measured(plan)
    missed = None
    if time is not None and time > shares["latency"]:
        missed = f"the pruned network takes {time:.1%} of the time, the target is {shares['latency']:.1%}"
    return PlanResult(
        plan, macs.fraction_of(plan), parameters.fraction_of(plan), time, missed, errors, search
    )


def apply_plan(checkpoint: str | Path, plan: PruningPlan, out: AnyPath) -> tuple[int, int]:
    """Write the smaller network of a plan with all weights (raw, averaged) that the file holds.

    Args:
        checkpoint: file of the network that the plan was made for.
        plan: units to keep.
        out: checkpoint to write.

    Returns:
        Numbers of parameters before and after.

    Raises:
        InputError: the plan does not fit the network, or `out` is the checkpoint itself.
    """
    out = Path(out)
    check_target(out, inputs=[checkpoint])
    kinds = load_checkpoint(checkpoint).available_weights
    states: dict[str, Any] = {"raw": None, "averaged": None}
    for kind in kinds:
        loaded = load_checkpoint(checkpoint, kind)
        check_not_stored(loaded.model, checkpoint)
        small = shrink(loaded.model, plan)
        states[kind] = small.state_dict()
    save_checkpoint(
        out,
        model=small,
        raw_state=states["raw"],
        averaged_state=states["averaged"],
        normalizers=loaded.normalizers,
        energy_kind=loaded.energy_kind,
        provenance={
            **inherited(loaded.provenance),
            "pruned_from": loaded.provenance,
            "plan": plan.to_dict(),
        },
    )
    return count_parameters(loaded.config), count_parameters(small.config)

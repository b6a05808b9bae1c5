"""From a checkpoint and data to a plan, and from a plan to a checkpoint: what `scripts/prune.py` calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch_geometric.data import Batch

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.files import check_target
from equiformer2.model.parameters import count_parameters
from equiformer2.pruning.calibration import FORCE_WEIGHT, Calibration
from equiformer2.pruning.calibration_data import read_structures
from equiformer2.pruning.cost.targets import CombinedTarget, LatencyTarget, MacTarget, ParameterTarget, Target
from equiformer2.pruning.structured.apply import masked, shrink
from equiformer2.pruning.structured.methods import find_plan
from equiformer2.pruning.structured.plan import PruningPlan

_ANY = 0.5


@dataclass(frozen=True)
class PlanRequest:
    """What to find a plan for.

    Attributes:
        checkpoint: of the dense network.
        data: structures to calibrate on, as in `read_structures`.
        targets: `macs=F`, `parameters=F` or `latency=F` with the share F that stays; all are to be reached.
        method: of `methods.METHODS`.
        weights: `raw` or `averaged`; None for the averaged ones where there are any.
        structures: how many to calibrate on.
        tries: cuts tried per step of a search.
        sphere: let a search cut the channels of the atoms' features.
        importance: by which a search ranks units before it tries cuts: `michel` or `taylor`.
        force_weight: λ of the loss, Å.
        batch_size: structures per forward pass.
        device: to compute on.
        seed: of the choice of structures and of everything drawn.
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
    batch_size: int = 8
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class MadePlan:
    """A plan and what it does.

    Attributes:
        plan: the plan.
        macs, parameters: shares that stay.
        latency: measured share of the time where that was a target.
        errors: against the dense network on the calibration structures (`Discrepancy.averages`).
        found: how a search went.
    """

    plan: PruningPlan
    macs: float
    parameters: float
    latency: float | None
    errors: dict[str, float | None]
    found: dict[str, Any]


def make_plan(request: PlanRequest, state_path: AnyPath | None = None, progress: bool = True) -> MadePlan:
    """Find the plan; a search continues from `state_path` where there is one.

    The times of a target of latency are kept beside it, as `NAME.times.json`.

    Raises:
        InputError: a target that is not understood or cannot be reached, an unknown method.
        datasets_oc20.DataError: data that cannot be read.
    """
    state_path = None if state_path is None else Path(state_path)
    wanted = _parse_targets(request.targets)
    checkpoint = load_checkpoint(request.checkpoint, request.weights, device=request.device)
    model = checkpoint.model.eval()
    structures = read_structures(request.data, request.structures, request.seed)
    calibration = Calibration(
        model, checkpoint.normalizers, structures, request.batch_size, request.force_weight
    )
    macs = MacTarget(model.config, wanted.get("macs", _ANY), *calibration.size)
    parameters = ParameterTarget(model.config, wanted.get("parameters", _ANY))
    targets: dict[str, Target] = {"macs": macs, "parameters": parameters}
    latency = None
    if "latency" in wanted:
        first = Batch.from_data_list(calibration.structures[:1]).to(request.device)
        times = None if state_path is None else state_path.with_suffix(".times.json")
        latency = targets["latency"] = LatencyTarget(model, first, wanted["latency"], times)
    together = CombinedTarget([targets[quantity] for quantity in wanted])
    plan, found = find_plan(
        request.method,
        model,
        checkpoint.normalizers,
        calibration,
        together.cost,
        together.target,
        wanted=together.wanted,
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
    return MadePlan(plan, macs.fraction_of(plan), parameters.fraction_of(plan), time, errors, found)


def summary(made: MadePlan) -> str:
    """What stays and what it changes, in two lines."""
    stays = [f"{made.macs:.1%} of the MACs", f"{made.parameters:.1%} of the parameters"]
    if made.latency is not None:
        stays.append(f"{made.latency:.1%} of the time")
    errors = [
        f"{text} {made.errors[name]:.4f} {unit}"
        for name, text, unit in (
            ("force_mae", "force MAE", "eV/Å"),
            ("energy_per_atom", "energy", "eV/atom"),
            ("loss", "loss", "eV"),
        )
        if made.errors[name] is not None
    ]
    return (
        f"stays: {', '.join(stays)}\nagainst the dense network, calibration structures: {', '.join(errors)}"
    )


def apply_plan(checkpoint: str | Path, plan: PruningPlan, out: AnyPath) -> tuple[int, int]:
    """Write the smaller network with all weights that the file holds; numbers of parameters before and after.

    Raises:
        InputError: the plan does not fit the network, or `out` is the checkpoint itself.
    """
    out = Path(out)
    check_target(out, inputs=[checkpoint])
    kinds = load_checkpoint(checkpoint).available_weights
    states: dict[str, Any] = {"raw": None, "averaged": None}
    for kind in kinds:
        loaded = load_checkpoint(checkpoint, kind)
        small = shrink(loaded.model, plan)
        states[kind] = small.state_dict()
    save_checkpoint(
        out,
        model=small,
        raw_state=states["raw"],
        averaged_state=states["averaged"],
        normalizers=loaded.normalizers,
        energy_kind=loaded.energy_kind,
        provenance={"pruned_from": loaded.provenance, "plan": plan.to_dict()},
    )
    return count_parameters(loaded.config), count_parameters(small.config)


def _parse_targets(texts: Sequence[str]) -> dict[str, float]:
    """Quantity -> share that stays."""
    wanted: dict[str, float] = {}
    for text in texts:
        quantity, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = float("nan")
        if quantity not in ("macs", "parameters", "latency") or not 0 < share < 1 or quantity in wanted:
            raise InputError(
                f"the target {text!r} is not understood: give macs=0.5, parameters=0.5 or latency=0.6, "
                "each at most once"
            )
        wanted[quantity] = share
    return wanted

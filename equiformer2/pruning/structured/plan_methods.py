"""Methods that make a structured plan, by their names: searches and baselines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Normalizers
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.structured.baselines import magnitude_plan, random_plan, uniform_plan
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.search import Cost, GreedySearch, SearchSettings, Stage

#: All dimensions but the sphere channels, whose removal changes what the norms see.
JOINT = ("block", "order", "attn_hidden", "head", "value", "ffn")
_STAGED = (("block", 0.2), ("order", 0.5), ("attn_hidden", 0.75), ("head", 0.9))
_LAST = ("attn_hidden", "head", "value", "ffn")

SEARCHES = ("multi", "multi_staged", "block")


def search_settings(
    method: str,
    tries: int = 8,
    seed: int = 0,
    sphere: bool = False,
    importance: Literal["michel", "taylor"] = "michel",
) -> SearchSettings:
    """Return the settings of a search by its name.

    Args:
        method: `multi` (all dimensions at once), `multi_staged` (MultiPruner's sequence of dimensions) or
            `block` (BlockPruner).
        tries: number of cuts tried per step.
        seed: random seed.
        sphere: also cut channels of the atoms' features; recover by training afterwards.
        importance: importance by which units are ranked before any cut is tried.

    Returns:
        Settings for `GreedySearch`.

    Raises:
        InputError: an unknown method.
    """
    if method not in SEARCHES:
        raise InputError(f"the search {method!r} is not known: use one of {', '.join(SEARCHES)}")
    common: dict[str, Any] = {"tries": tries, "seed": seed, "importance": importance}
    if method == "block":
        return SearchSettings((Stage(("block",)),), per_cost=False, **common)
    if method == "multi":
        return SearchSettings((Stage((*JOINT, "sphere") if sphere else JOINT),), **common)
    stages = [Stage((dimension,), share) for dimension, share in _STAGED]
    # Feed-forward widths alone cost too little to close the gap.
    stages.append(Stage((*_LAST, "sphere") if sphere else _LAST))
    return SearchSettings(tuple(stages), **common)


BASELINES = ("random", "magnitude", "uniform")
METHODS = (*SEARCHES, *BASELINES)


def find_plan(
    method: str,
    model: EquiformerV2,
    normalizers: Normalizers,
    calibration: Calibration,
    cost: Cost,
    target: float,
    *,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    tries: int = 8,
    sphere: bool = False,
    importance: Literal["michel", "taylor"] = "michel",
    state_path: AnyPath | None = None,
    progress: bool = True,
) -> tuple[PruningPlan, dict[str, Any]]:
    """Find a plan that costs at most `target`.

    Args:
        method: name of the method, of `METHODS`.
        model: dense network.
        normalizers: units of its outputs.
        calibration: structures with its answers.
        cost: cost of a plan, in the unit of `target`.
        target: cost to come down to.
        shares: parts of the cost (`CombinedTarget.shares`); a stored search for others is not continued.
        seed: random seed.
        tries: number of cuts tried per step of a search.
        sphere: let a search cut channels of the atoms' features, too.
        importance: importance by which a search ranks units before it tries cuts (see `importance`).
        state_path: file of a search's state, from which it continues; None keeps none.
        progress: show a progress bar.

    Returns:
        The plan in canonical form, and of a search the numbers of steps (`cuts`) and of cuts `tried`, and its
        work in `passes` of the dense network (see `cost.work`); empty for a baseline.

    Raises:
        InputError: an unknown method, a target that it cannot reach, a state of another search.
    """
    state_path = None if state_path is None else Path(state_path)
    if method not in METHODS:
        raise InputError(f"the method {method!r} is not known: use one of {', '.join(METHODS)}")
    if method == "random":
        return random_plan(model, cost, target, seed).checked(model.config), {}
    if method == "magnitude":
        return magnitude_plan(model, cost, target).checked(model.config), {}
    if method == "uniform":
        return uniform_plan(model, cost, target), {}
    settings = search_settings(method, tries, seed, sphere, importance)
    search = GreedySearch(
        model, normalizers, calibration, cost, target, settings, state_path, progress=progress, shares=shares
    )
    state = search.run()
    counts = {
        "cuts": len(state.steps),
        "tried": sum(step.tried for step in state.steps),
        "passes": round(state.passes, 1),
    }
    return state.plan.checked(model.config), counts

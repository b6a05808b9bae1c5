"""Routers in JSON files."""

import os
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import read_json
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, write_json
from equiformer2.pruning.routing.active_region import ActiveRegion
from equiformer2.pruning.routing.frozen import FrozenPlan
from equiformer2.pruning.routing.ftp import FTPRouter
from equiformer2.pruning.routing.geometric_routers import (
    DegreeRouter,
    DistanceRouter,
    RandomRouter,
    StaticRouter,
)
from equiformer2.pruning.routing.router import BaseRouter, ScoreRouter
from equiformer2.pruning.routing.zero_tprune import AtomPruner, EdgePruner
from equiformer2.values import mapping, shown

_MOST_BYTES = 16 << 20
_KINDS: tuple[type[BaseRouter], ...] = (
    ActiveRegion,
    AtomPruner,
    DegreeRouter,
    DistanceRouter,
    EdgePruner,
    FrozenPlan,
    FTPRouter,
    RandomRouter,
    StaticRouter,
)
KINDS = {kind.__name__: kind for kind in _KINDS}


def router_to_dict(router: BaseRouter) -> dict[str, Any]:
    """As JSON can hold it: the name of its class and its settings.

    Raises:
        InputError: it is none of `KINDS`.
    """
    if type(router).__name__ not in KINDS:
        raise InputError(f"a {type(router).__name__} cannot be stored; known are {', '.join(KINDS)}")
    settings = {
        name: router_to_dict(value) if isinstance(value, BaseRouter) else value
        for name, value in router.settings().items()
    }
    return {"kind": type(router).__name__, "settings": settings}


def router_from_dict(record: Any) -> BaseRouter:
    """Inverse of `router_to_dict`.

    Raises:
        InputError: the record is not one of a router.
    """
    if not isinstance(record, dict) or set(record) != {"kind", "settings"}:
        raise InputError("this is not a router: it needs the keys kind and settings")
    if not isinstance(record["kind"], str) or record["kind"] not in KINDS:
        raise InputError(f"the kind of router {shown(record['kind'])} is not known: {', '.join(KINDS)}")
    settings = dict(mapping(record["settings"], "the settings of a router"))
    if "router" in settings:
        settings["router"] = router_from_dict(settings["router"])
    try:
        return KINDS[record["kind"]](**settings)
    except TypeError as error:
        raise InputError(f"the settings of {record['kind']} are wrong: {error}") from error


def save_router(path: str | os.PathLike[str], router: BaseRouter) -> Path:
    """Write a router as JSON, whole or not at all."""
    return write_json(path, router_to_dict(router))


def load_router(path: str | os.PathLike[str]) -> BaseRouter:
    """Read a router.

    Raises:
        InputError: the file holds no router; it is named.
        OSError: it cannot be read.
    """
    with as_input_error():
        record = read_json(path, _MOST_BYTES)
    try:
        return router_from_dict(record)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def jumps(router: BaseRouter) -> bool:
    """Whether what it skips can change at once while atoms move, so that forces jump."""
    if isinstance(router, ScoreRouter):
        return router.mode != "smooth"
    return not isinstance(router, ActiveRegion)


def for_evaluation(path: str | None) -> BaseRouter | None:
    """Chooses for every structure by itself: a stored plan of a relaxation is left out.

    Raises:
        InputError: the file holds no router.
    """
    if path is None:
        return None
    router = load_router(path)
    return router.router if isinstance(router, FrozenPlan) else router


def for_relaxation(path: str | None, replan_every: int | None = None) -> BaseRouter | None:
    """For one structure that moves: with a `FrozenPlan` if its choice jumps.

    Args:
        path: of the router; None for none.
        replan_every: steps per plan; None for what is stored, or 10.

    Raises:
        InputError: the file holds no router, or there is nothing to plan.
    """
    if path is None:
        if replan_every is not None:
            raise InputError("--replan-every is for a router: give --router, too, or leave it out")
        return None
    stored = load_router(path)
    inner = stored.router if isinstance(stored, FrozenPlan) else stored
    if not jumps(inner):
        if replan_every is not None:
            raise InputError(f"what {path} skips does not jump along a relaxation: leave out --replan-every")
        return inner
    plan = stored if isinstance(stored, FrozenPlan) else FrozenPlan(inner)
    if replan_every is None:
        return plan
    return FrozenPlan(inner, replan_every, plan.max_move)


def for_batched_relaxation(path: str | None) -> BaseRouter | None:
    """For batches of structures that move, which come and go: a plan for each of them is not kept.

    Raises:
        InputError: the file holds no router, or one whose choice jumps.
    """
    router = for_evaluation(path)
    if router is not None and jumps(router):
        raise InputError(
            f"what {path} skips jumps along a relaxation, and batches keep no plan: use a router of the mode "
            "smooth or one that asks the tags alone (context_only), or relax one structure with "
            "`equiformer2 relax`"
        )
    return router

"""Routers in JSON files, and as evaluations and relaxations use them."""

import os
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import read_json
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, write_json
from equiformer2.pruning.routing.active_region import ActiveRegion
from equiformer2.pruning.routing.frozen_plan import FrozenPlan
from equiformer2.pruning.routing.ftp import FTPRouter
from equiformer2.pruning.routing.geometric_routers import (
    DegreeRouter,
    DistanceRouter,
    RandomRouter,
    StaticRouter,
)
from equiformer2.pruning.routing.router import BaseRouter
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
    """Describe a router by the name of its class and its settings, as JSON can hold them.

    Args:
        router: a router of one of `KINDS`.

    Returns:
        `{"kind": …, "settings": …}`.

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
    """Make the router of a description.

    Args:
        record: value of `router_to_dict`.

    Returns:
        The router.

    Raises:
        InputError: the record does not describe a router.
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
    """Write a router as JSON, atomically.

    Args:
        path: file to write.
        router: a router of one of `KINDS`.

    Returns:
        The path.

    Raises:
        InputError: the router is none of `KINDS`.
    """
    return write_json(path, router_to_dict(router))


def load_router(path: str | os.PathLike[str]) -> BaseRouter:
    """Read a router from a JSON file.

    Args:
        path: file to read.

    Returns:
        The router.

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


def evaluation_router(path: str | None) -> BaseRouter | None:
    """Read a router for single structures: a stored plan of a relaxation is left out.

    Args:
        path: file of the router; None for none.

    Returns:
        The router that decides for every structure by itself, or None.

    Raises:
        InputError: the file holds no router.
    """
    if path is None:
        return None
    router = load_router(path)
    return router.router if isinstance(router, FrozenPlan) else router


def relaxation_router(path: str | None, replan_every: int | None = None) -> BaseRouter | None:
    """Read a router for one structure that moves, with a `FrozenPlan` if its selection is abrupt.

    Args:
        path: file of the router; None for none.
        replan_every: evaluations per plan; None for the number in the file, or 10.

    Returns:
        The router, which is for one trajectory only, or None.

    Raises:
        InputError: the file holds no router, or there is nothing to plan.
    """
    if path is None:
        if replan_every is not None:
            raise InputError("--replan-every is for a router: give --router, too, or leave it out")
        return None
    stored = load_router(path)
    inner = stored.router if isinstance(stored, FrozenPlan) else stored
    if not inner.abrupt:
        if replan_every is not None:
            raise InputError(f"what {path} skips does not jump along a relaxation: leave out --replan-every")
        return inner
    plan = stored if isinstance(stored, FrozenPlan) else FrozenPlan(inner)
    if replan_every is None:
        return plan
    return FrozenPlan(inner, replan_every, plan.max_move)


def batched_relaxation_router(path: str | None) -> BaseRouter | None:
    """Read a router for batches of structures that move and come and go: no plan is kept for each of them.

    Args:
        path: file of the router; None for none.

    Returns:
        The router, or None.

    Raises:
        InputError: the file holds no router, or one whose selection is abrupt.
    """
    router = evaluation_router(path)
    if router is not None and router.abrupt:
        raise InputError(
            f"what {path} skips jumps along a relaxation, and batches keep no plan: use a router of the mode "
            "smooth or one that asks the tags alone (context_only), or relax one structure with "
            "`equiformer2 relax`"
        )
    return router

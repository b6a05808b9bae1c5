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
from equiformer2.pruning.routing.router import Router
from equiformer2.pruning.routing.static import DegreeRouter, DistanceRouter, RandomRouter, StaticRouter
from equiformer2.pruning.routing.zero_tprune import AtomPruner, EdgePruner
from equiformer2.values import mapping, shown

_MOST_BYTES = 16 << 20
_KINDS: tuple[type[Router], ...] = (
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


def router_to_dict(router: Router) -> dict[str, Any]:
    """As JSON can hold it: the name of its class and its settings.

    Raises:
        InputError: it is none of `KINDS`.
    """
    if type(router).__name__ not in KINDS:
        raise InputError(f"a {type(router).__name__} cannot be stored; known are {', '.join(KINDS)}")
    settings = {
        name: router_to_dict(value) if isinstance(value, Router) else value
        for name, value in router.settings().items()
    }
    return {"kind": type(router).__name__, "settings": settings}


def router_from_dict(record: Any) -> Router:
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


def save_router(path: str | os.PathLike[str], router: Router) -> Path:
    """Write a router as JSON, whole or not at all."""
    return write_json(path, router_to_dict(router))


def load_router(path: str | os.PathLike[str]) -> Router:
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

"""The names of adsorbates by system, which the LMDB files do not have."""

from pathlib import Path
from typing import Any

import orjson

from datasets_oc20.errors import DataError
from datasets_oc20.safe_pickle import RefusedPickleError, load_inert
from datasets_oc20.untrusted import AnyPath


def read_adsorbate_names(path: AnyPath) -> dict[str, str]:
    """Adsorbate by `sid`, as in `{"random1447590": "*CH2*O"}`.

    Args:
        path: a JSON file with such an object, or OC20's `oc20_data_mapping.pkl`, of which `ads_symbols` is
            read. The pickle is read as data; one that would run code is refused.

    Raises:
        DataError: another file.
        OSError: missing or unreadable.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        table: Any = load_inert(content) if path.suffix == ".pkl" else orjson.loads(content)
    except (RefusedPickleError, orjson.JSONDecodeError) as error:
        raise DataError(f"{path}: the names of adsorbates cannot be read ({error}).") from error
    names = {}
    for sid, value in table.items() if isinstance(table, dict) else []:
        name = value.get("ads_symbols") if isinstance(value, dict) else value
        if not isinstance(name, str):
            raise DataError(f"{path}: system {sid} has no name of an adsorbate; give sid and name.")
        names[str(sid)] = name
    if not names:
        raise DataError(f"{path}: there are no names of adsorbates by system in it.")
    return names


def adsorbate_of(sid: str, names: dict[str, str]) -> str | None:
    """The name for a system; OC20's LMDB files have `17` where its tables have `random17`."""
    return names.get(sid) or names.get(f"random{sid}")

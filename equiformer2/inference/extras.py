"""Extra information of a user's structure, in a form that every file can hold."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties

OWN_ARRAYS = frozenset(
    {
        "numbers", "positions", "tags", "momenta", "masses", "initial_magmoms", "initial_charges",
    }
)  # fmt: skip
"""Arrays of `ase.Atoms` itself; all others are extras."""

_RESERVED = frozenset(
    {
        *all_properties, *OWN_ARRAYS, "lattice", "properties", "pbc", "species", "symbols", "pos",
        "move_mask", "force", "virial", "cell", "calc", "constraints", "tag", "z", "fixed",
    }
)  # fmt: skip
"""Names that files and readers give a meaning of their own, in lower case."""

_DEEPEST = 6
_LONGEST = 1000
"""Characters of the text that stands for an object of another kind."""


def extras(atoms: Atoms) -> dict[str, dict[str, Any]]:
    """`{"info": {...}, "arrays": {...}}` of plain values for JSON; either is missing where there is nothing.

    Numbers, texts, lists and mappings are kept, NaN and infinities become text, and so does anything else.
    """
    arrays = {name: value for name, value in atoms.arrays.items() if name not in OWN_ARRAYS}
    found = {"info": plain(atoms.info), "arrays": plain(arrays)}
    return {name: value for name, value in found.items() if value}


def simple_info(atoms: Atoms) -> dict[str, str | int | float | bool]:
    """Entries of `atoms.info` that extended XYZ keeps as they are: single values, names without a meaning."""
    found = {}
    for name, value in atoms.info.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name) or name.lower() in _RESERVED:
            continue
        value = plain(value)
        if isinstance(value, bool | int | float) or (
            isinstance(value, str) and value.isprintable() and not set("\"'\\") & set(value)
        ):
            found[name] = value
    return found


def plain(value: Any, depth: int = 0) -> Any:
    """`value` of JSON's own types only."""
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufUS":
        value = value.tolist()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth < _DEEPEST:
        if isinstance(value, Mapping):
            return {str(name): plain(part, depth + 1) for name, part in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [plain(part, depth + 1) for part in value]
    try:
        return repr(value)[:_LONGEST]
    except Exception:  # an object of somebody else
        return type(value).__name__

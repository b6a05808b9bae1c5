"""OC20's own LMDB records, of every age, translated to the data object. The only place with old names.

What differs between the ages: PyG 1 keeps the fields in the object's `__dict__`, PyG 2 in a
`GlobalStorage` below `_store`; S2EF records have `y` and `force`, IS2RE records `y_init`, `y_relaxed` and
`pos_relaxed` (with `pos` the initial structure).
"""

import math
from typing import Any

import numpy as np

from datasets_oc20.errors import DataError
from datasets_oc20.safe_pickle import (
    MAX_DIMENSIONS,
    PickledArray,
    PickledObject,
    PickledTensor,
    RefusedPickleError,
    load_inert,
)
from datasets_oc20.schema import LARGEST_ATOMS, as_array

# A newer name, where both are there, wins over the older one.
_OLD_NAMES = {"force": "forces", "y": "energy"}
_COPIED = (
    "pos", "atomic_numbers", "cell", "pbc", "tags", "fixed", "y_init", "y_relaxed", "pos_relaxed",
    "natoms",
)  # fmt: skip


def is_pickle(value: bytes) -> bool:
    """Whether `value` starts like a pickle of protocol 2 or newer, as all of OC20's do."""
    return value[:1] == b"\x80" and value[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def read_length(value: bytes, where: str) -> int:
    """The value of the key `length`: a pickled int in OC20's files, ASCII digits in ours."""
    try:
        length = load_inert(value) if is_pickle(value) else int(value.decode("ascii"))
    except (RefusedPickleError, ValueError) as error:
        raise DataError(f"{where}: the number of records cannot be read ({error}).") from error
    if isinstance(length, bool) or not isinstance(length, int | np.integer) or not 0 <= length < 10**100:
        said = "impossible" if isinstance(length, int | np.integer) else f"a {type(length).__name__}"
        raise DataError(f"{where}: the number of records is {said}; write the dataset again.")
    return int(length)


def read_fields(value: bytes, where: str) -> dict[str, Any]:
    """The fields of a pickled OC20 record under the names of the data object.

    Stored edges are dropped: the graph is built for the model's own cutoff. `pbc` is True in all three
    directions where OC20 did not store it. In an IS2RE record `energy` is `y_relaxed`, and there are
    no `forces`, because the stored ones belong to another structure than `y_relaxed`.

    Raises:
        DataError: not an OC20 record, or a pickle that would run code.
    """
    stored = _stored(value, where)
    fields = {name: _plain(stored[name], where) for name in _COPIED if stored.get(name) is not None}
    for old, new in _OLD_NAMES.items():
        source = new if stored.get(new) is not None else old
        if stored.get(source) is not None:
            fields[new] = _plain(stored[source], where)
    if "y_relaxed" in fields:
        fields["energy"] = fields["y_relaxed"]
        fields.pop("forces", None)
    fields.setdefault("pbc", np.ones((1, 3), dtype=bool))
    return fields | {"sid": _plain(stored.get("sid", ""), where), "fid": _plain(stored.get("fid", 0), where)}


def read_natoms(value: bytes, where: str) -> int:
    """The number of atoms of a pickled OC20 record, without building its tensors."""
    stored = _stored(value, where)
    numbers = stored.get("atomic_numbers")
    if numbers is None:
        raise DataError(f"{where}: the record has no atomic_numbers; it is not an OC20 record.")
    if isinstance(numbers, PickledTensor):
        sizes = numbers.size
        sound = len(sizes) <= MAX_DIMENSIONS and all(type(n) is int and n > 0 for n in sizes)
        natoms = math.prod(sizes) if sound else 0
    else:
        natoms = as_array(_plain(numbers, where), "atomic_numbers", where).size
    if not 0 < natoms <= LARGEST_ATOMS:
        raise DataError(f"{where}: atomic_numbers has an impossible size; write the dataset again.")
    return natoms


def _stored(value: bytes, where: str) -> dict[str, Any]:
    if not is_pickle(value):
        raise DataError(f"{where}: the value is not an OC20 record.")
    try:
        record = load_inert(value)
    except RefusedPickleError as error:
        raise DataError(f"{where}: the pickle is refused, {error}.") from error
    if not isinstance(record, PickledObject):
        raise DataError(f"{where}: the value is a {type(record).__name__}, not an OC20 record.")
    store = record.state.get("_store")
    if isinstance(store, PickledObject):
        mapping = store.state.get("_mapping")
        if isinstance(mapping, dict):
            return mapping
    return record.state


def _plain(value: Any, where: str) -> Any:
    """Tensors and arrays for the stand-ins; everything else as it is."""
    try:
        if isinstance(value, PickledTensor):
            return value.tensor()
        if isinstance(value, PickledArray):
            return value.array()
    except RefusedPickleError as error:
        raise DataError(f"{where}: the pickle is refused, {error}.") from error
    return value

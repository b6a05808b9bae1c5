"""OC20's own LMDB records, of every age, translated to the data object. The only place with old names.

The ages differ: PyG 1 keeps the fields in the object's `__dict__`, PyG 2 in a `GlobalStorage` below `_store`;
S2EF records have `y` and `force`, IS2RE records `y_init`, `y_relaxed` and `pos_relaxed` (with `pos` the
initial structure).
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
    """Tell whether `value` starts like a pickle of protocol 2 or newer, as all of OC20's do."""
    return value[:1] == b"\x80" and value[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def read_length(value: bytes, where: str) -> int:
    """Decode the value of the key `length`: a pickled int in OC20's files, ASCII digits in ours.

    Args:
        value: the stored bytes.
        where: file and key, for the error message.

    Raises:
        DataError: the value is no number of records.
    """
    try:
        length = load_inert(value) if is_pickle(value) else int(value.decode("ascii"))
    except (RefusedPickleError, ValueError) as error:
        raise DataError(f"{where}: the number of records cannot be read ({error}).") from error
    if isinstance(length, bool) or not isinstance(length, int | np.integer) or not 0 <= length < 10**100:
        kind = "impossible" if isinstance(length, int | np.integer) else f"a {type(length).__name__}"
        raise DataError(f"{where}: the number of records is {kind}; write the dataset again.")
    return int(length)


class LegacyRecord:
    """A pickled OC20 record, loaded as inert data; its tensors are built when they are asked for.

    Args:
        value: the stored bytes.
        where: file and key, for error messages.

    Raises:
        DataError: not an OC20 record, or a pickle that would run code.
    """

    def __init__(self, value: bytes, where: str) -> None:
        self._where = where
        if not is_pickle(value):
            raise DataError(f"{where}: the value is not an OC20 record.")
        try:
            record = load_inert(value)
        except RefusedPickleError as error:
            raise DataError(f"{where}: the pickle is refused, {error}.") from error
        if not isinstance(record, PickledObject):
            raise DataError(f"{where}: the value is a {type(record).__name__}, not an OC20 record.")
        self._stored: dict[str, Any] = record.state
        store = record.state.get("_store")
        if isinstance(store, PickledObject):
            mapping = store.state.get("_mapping")
            if isinstance(mapping, dict):
                self._stored = mapping

    def fields(self) -> dict[str, Any]:
        """Return the fields under the names of the data object (`structure_record.make_data`).

        Stored edges are dropped: the graph is built for the model's own cutoff. `pbc` is True in all three
        directions where OC20 did not store it. In an IS2RE record `energy` is `y_relaxed`, and there are
        no `forces`, because the stored ones belong to another structure than `y_relaxed`.

        Raises:
            DataError: a tensor or an array is damaged.
        """
        fields = {name: self._value(name) for name in _COPIED if self._stored.get(name) is not None}
        for old, new in _OLD_NAMES.items():
            source = new if self._stored.get(new) is not None else old
            if self._stored.get(source) is not None:
                fields[new] = self._value(source)
        if "y_relaxed" in fields:
            fields["energy"] = fields["y_relaxed"]
            fields.pop("forces", None)
        fields.setdefault("pbc", np.ones((1, 3), dtype=bool))
        return fields | {"sid": self._value("sid", ""), "fid": self._value("fid", 0)}

    def natoms(self) -> int:
        """Return the number of atoms without building a tensor.

        Raises:
            DataError: the record has no `atomic_numbers`, or their shape is impossible.
        """
        numbers = self._stored.get("atomic_numbers")
        if numbers is None:
            raise DataError(f"{self._where}: the record has no atomic_numbers; it is not an OC20 record.")
        if isinstance(numbers, PickledTensor):
            sizes = numbers.size
            possible = len(sizes) <= MAX_DIMENSIONS and all(type(n) is int and n > 0 for n in sizes)
            natoms = math.prod(sizes) if possible else 0
        else:
            natoms = as_array(self._value("atomic_numbers"), "atomic_numbers", self._where).size
        if not 0 < natoms <= LARGEST_ATOMS:
            raise DataError(f"{self._where}: atomic_numbers has an impossible size; write the dataset again.")
        return natoms

    def _value(self, name: str, default: Any = None) -> Any:
        """Tensors and arrays for their stand-ins; everything else unchanged."""
        value = self._stored.get(name, default)
        try:
            if isinstance(value, PickledTensor):
                return value.tensor()
            if isinstance(value, PickledArray):
                return value.array()
        except RefusedPickleError as error:
            raise DataError(f"{self._where}: the pickle is refused, {error}.") from error
        return value

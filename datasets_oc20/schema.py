"""The schema of a record: type, range, unit and shape of every field, checked on reading and writing.

All formats (ours, OC20's pickles, ASE-LMDB, raw frames) come through `checked_arrays`, `checked_sid` and
`checked_fid`, so that nothing is cast unnoticed: a tag of 1.5 would become 1 and a NaN among flags True. The
validator is our own: pydantic and msgspec check the types of Python values, and see an array, not the numbers
in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch

from datasets_oc20.errors import DataError

MAX_ATOMIC_NUMBER = 118
LARGEST_ENERGY = 1e9
"""eV; all electrons of thousands of heavy atoms have less. One larger label would spoil a mean and spread."""
LARGEST_FORCE = 1e4
"""eV/Å; OC20 keeps frames below 50, and nuclei would have to be some 0.1 Å apart."""
LARGEST_COORDINATE = 1e6
"""Å; what the search for neighbours takes."""
LARGEST_ATOMS = 10_000_000
LARGEST_SID = 1000
"""Characters of a system id."""
LARGEST_FID = 2**53

_DOUBLE, _FLOAT = np.dtype("<f8"), np.dtype("<f4")
_INT, _BYTE, _BOOL = np.dtype("<i8"), np.dtype("u1"), np.dtype("?")


_TAGS = "tags are 0 (held), 1 (free slab atom) or 2 (adsorbate); set these in place of ASE layer numbers"
_SINGULAR = {"atomic_numbers": "atomic number", "tags": "tag", "fixed": "fixed", "pbc": "pbc"}


@dataclass(frozen=True)
class Field:
    """Requirements on one field of a record.

    Attributes:
        name: in the data object.
        kind: real numbers; whole numbers, of any type; flags, which are booleans or the numbers 0 and 1.
        dtype: in the data object.
        stored: dtype on disk.
        shape: with "N" for the number of atoms.
        lowest: smallest allowed value.
        largest: largest allowed value.
        unit: for messages.
        remedy: reason and remedy for a value outside the range, for messages.
        required: True if every record has the field.
    """

    name: str
    kind: Literal["real", "whole", "flag"]
    dtype: np.dtype
    stored: np.dtype
    shape: tuple[Any, ...]
    lowest: float
    largest: float
    unit: str = ""
    remedy: str = "remove the record"
    required: bool = False

    @classmethod
    def energy(cls, name: str) -> "Field":
        """Define an energy of the structure, eV."""
        limit, remedy = LARGEST_ENERGY, "which no structure has; remove the record"
        return cls(name, "real", _DOUBLE, _DOUBLE, (1,), -limit, limit, "eV", remedy)

    @classmethod
    def lengths(cls, name: str, *shape: Any, required: bool = False) -> "Field":
        """Define coordinates or lattice vectors, Å."""
        limit = LARGEST_COORDINATE
        remedy = "which is too far out; move the structure to the origin, or remove the record"
        return cls(name, "real", _DOUBLE, _DOUBLE, shape, -limit, limit, "Å", remedy, required)

    @property
    def per_atom(self) -> bool:
        """True if the first axis counts atoms."""
        return self.shape[0] == "N"

    def check(self, array: np.ndarray, natoms: int, where: str) -> np.ndarray:
        """Return `array` in the shape and dtype of the data object.

        Args:
            array: numbers or booleans; flat, or with more or fewer axes of length 1.
            natoms: number of atoms of the record.
            where: file and key, for the error message.

        Raises:
            DataError: another shape, or a value that is not allowed; the first one and its atom are named.
        """
        shape = tuple(natoms if size == "N" else size for size in self.shape)
        squeezed = [size for size in shape if size != 1]
        flat = array.ndim == 1 and array.size == prod(shape)
        if array.shape != shape and not flat and [n for n in array.shape if n != 1] != squeezed:
            raise DataError(
                f"{where}: {self.name} has shape {list(array.shape)}, expected {list(shape)} for {natoms} "
                "atoms."
            )
        array = array.reshape(shape)
        if array.dtype.kind == "b" and self.kind != "flag":
            raise DataError(f"{where}: {self.name} holds true and false, not numbers.")
        # NaN is neither below nor above, and so takes the slow branch, too.
        if not (array.min() >= self.lowest and array.max() <= self.largest):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                text = "holds NaN or infinite values{place}; remove the record"
                self._raise_first(~np.isfinite(array), text, where)
            self._raise_outside(array, where)
        if self.kind != "real" and array.dtype.kind == "f":
            fractional = array != np.floor(array)
            if fractional.any():
                text = "holds {value}{place}; it must be a whole number"
                self._raise_first(fractional, text, where, array)
        return array.astype(self.dtype)

    def _raise_outside(self, array: np.ndarray, where: str) -> None:
        """Raise `DataError` for the first value outside the range."""
        outside = (array < self.lowest) | (array > self.largest)
        row = int(np.flatnonzero(outside.reshape(len(outside), -1).any(axis=1))[0])
        unit = f" {self.unit}" if self.unit else ""
        if self.name == "forces":
            raise DataError(f"{where}: the force on atom {row} is {array[row].tolist()} eV/Å, {self.remedy}.")
        if self.per_atom and self.kind == "whole":
            joint = "," if self.name == "atomic_numbers" else ";"
            raise DataError(
                f"{where}: atom {row} has {_SINGULAR[self.name]} {array[row]:g}{joint} {self.remedy}."
            )
        joint = "; " if self.remedy.startswith(("remove", "flags")) else ", "
        self._raise_first(outside, f"is {{value}}{unit}{{place}}{joint}{self.remedy}", where, array)

    def _raise_first(self, wrong: np.ndarray, text: str, where: str, array: np.ndarray | None = None) -> None:
        """Raise `DataError` for the first value that is wrong; `text` has places for value and atom."""
        first = int(np.flatnonzero(wrong.reshape(-1))[0])
        row = first // max(1, wrong[0].size)
        place = f" (atom {row})" if self.per_atom else ""
        value = "" if array is None else f"{float(array.reshape(-1)[first]):.6g}"
        raise DataError(f"{where}: {self.name} {text.format(value=value, place=place)}.")


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field.lengths("pos", "N", 3, required=True),
        Field(
            "atomic_numbers", "whole", _INT, _BYTE, ("N",), 1, MAX_ATOMIC_NUMBER,
            remedy="which no element has", required=True,
        ),
        Field.lengths("cell", 1, 3, 3, required=True),
        Field("pbc", "flag", _BOOL, _BOOL, (1, 3), 0, 1, remedy="flags are 0 or 1", required=True),
        Field("tags", "whole", _INT, _BYTE, ("N",), 0, 2, remedy=_TAGS, required=True),
        Field("fixed", "flag", _BOOL, _BOOL, ("N",), 0, 1, remedy="flags are 0 or 1", required=True),
        Field.energy("energy"),
        Field(
            "forces", "real", _FLOAT, _FLOAT, ("N", 3), -LARGEST_FORCE, LARGEST_FORCE, "eV/Å",
            "which no usable frame has; remove the record",
        ),
        Field("stress", "real", _FLOAT, _FLOAT, (1, 3, 3), -LARGEST_FORCE, LARGEST_FORCE, "eV/Å^3"),
        Field.energy("y_init"),
        Field.energy("y_relaxed"),
        Field.lengths("pos_relaxed", "N", 3),
    )
}  # fmt: skip
REQUIRED = tuple(name for name, field in FIELDS.items() if field.required)

STORED = {
    name: {
        dtype.str: dtype for dtype in ((field.stored, _FLOAT) if field.stored == _DOUBLE else (field.stored,))
    }
    for name, field in FIELDS.items()
}
"""The dtypes in which a field may lie in a file, by name: old files have float32 for what is float64 now."""


def checked_arrays(fields: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Return the arrays of a record in the types of the data object.

    Args:
        fields: values by the names of `FIELDS`; others but `natoms` are not looked at. Arrays, tensors, lists
            or numbers of these shapes, flat or with more or fewer axes of length 1.
        where: file and key, for the error message.

    Raises:
        DataError: a field is missing, has another shape, or breaks a rule of `FIELDS`.
    """
    missing = [name for name in REQUIRED if fields.get(name) is None]
    if missing:
        raise DataError(
            f"{where}: the record has no {' and no '.join(missing)}; it is not an OC20 record, or one from "
            "before these fields existed: preprocess the raw files again."
        )
    given = {name: as_array(fields[name], name, where) for name in FIELDS if fields.get(name) is not None}
    natoms = given["atomic_numbers"].size
    if natoms == 0:
        raise DataError(f"{where}: the record has no atoms.")
    if natoms > LARGEST_ATOMS:
        raise DataError(f"{where}: the record has {natoms} atoms, more than can be.")
    check_natoms(fields.get("natoms"), natoms, where)
    arrays = {name: FIELDS[name].check(array, natoms, where) for name, array in given.items()}
    if arrays["pbc"].all() and abs(np.linalg.det(arrays["cell"][0])) < 1e-6:
        raise DataError(f"{where}: the structure is periodic but its cell has no volume.")
    return arrays


def as_array(value: Any, name: str, where: str) -> np.ndarray:
    """Return `value` as an array of plain numbers or booleans.

    Args:
        value: an array, a tensor, a number, or lists of numbers.
        name: of the field, for the error message.
        where: file and key, for the error message.

    Raises:
        DataError: it holds something other than numbers, or lists that are uneven or nested too deep.
    """

    def check_size(values: list[Any] | tuple[Any, ...]) -> None:
        # Lists may repeat each other and so be larger than all memory when written out.
        open_lists: list[tuple[Any, int]] = [(values, 1)]
        left = 10 * LARGEST_ATOMS
        while open_lists:
            inner, depth = open_lists.pop()
            left -= 1 + len(inner)
            if depth > 4 or left < 0:
                raise ValueError("nested too deep, or too many values")
            open_lists += [(item, depth + 1) for item in inner if isinstance(item, list | tuple)]

    try:
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().numpy()
        else:
            if isinstance(value, list | tuple):
                check_size(value)
            array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OverflowError) as error:
        kind = "values of unequal length" if isinstance(value, list | tuple) else type(value).__name__
        raise DataError(f"{where}: {name} holds {kind}, not an array of numbers.") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: {name} holds {array.dtype}, not numbers.")
    return array


def check_natoms(stated: Any, natoms: int, where: str) -> None:
    """Raise `DataError`, naming `where`, if the `stated` number of atoms is not None and not `natoms`."""
    if stated is None:
        return
    array = as_array(stated, "natoms", where)
    if array.size != 1 or array.dtype.kind == "b" or array.reshape(-1)[0] != natoms:
        value = array.reshape(-1)[0].item() if array.size == 1 else f"{array.size} numbers"
        raise DataError(f"{where}: natoms is {value}, but the record has {natoms} atoms; write it again.")


def scalar(value: Any) -> Any:
    """Return the Python number in a tensor or array of one element; everything else unchanged."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor | np.ndarray):
        try:
            return value.reshape(-1)[0].item() if value.reshape(-1).shape[0] == 1 else value
        except (RuntimeError, NotImplementedError, TypeError):
            return value
    return value


def checked_sid(value: Any, where: str) -> str:
    """Return a system id as text; None becomes empty text.

    Args:
        value: text, a whole number, or None.
        where: file and key, for the error message.

    Raises:
        DataError: neither text nor a whole number, longer than LARGEST_SID characters, or text that is not
            Unicode.
    """
    value = scalar(value)
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_FID:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: sid is a {type(value).__name__}; it must be text or a whole number.")
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise DataError(f"{where}: sid is a number of more than 64 bits; write it as text.")
        return str(value)
    if len(value) > LARGEST_SID:
        raise DataError(f"{where}: sid has {len(value)} characters; it may have {LARGEST_SID}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: sid is not text in Unicode; give the system another name.") from error
    return value


def checked_fid(value: Any, where: str) -> int:
    """Return a frame number.

    Args:
        value: a whole number, or text such as OC20's "frame17".
        where: file and key, for the error message.

    Raises:
        DataError: not a whole number, or one beyond LARGEST_FID.
    """
    given = value = scalar(value)
    if isinstance(value, str):
        digits = value.removeprefix("frame")
        sign = digits.removeprefix("-")
        value = int(digits) if sign.isascii() and sign.isdigit() and len(sign) <= 16 else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST_FID:
        text = repr(given) if isinstance(given, str | int | float | None) else f"a {type(given).__name__}"
        text = text if len(text) <= 40 else f"{text[:40]}…"
        raise DataError(f"{where}: fid is {text}, not a frame number; give whole numbers from 0.")
    return value

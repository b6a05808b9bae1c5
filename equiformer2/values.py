"""Rules for values that come from files, configurations and callers: type, range and size.

A rule gives a value back in its plain Python type, or raises an `InputError` that names it. Nothing is
guessed: text is no number and no switch, a switch is no number, and a whole number is not written as 3.0.
Scalars of numpy count as the Python values that they equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from equiformer2.errors import InputError

MAX_DEPTH = 64
"""Most nested lists and dictionaries of a value from a file."""
MAX_VALUES = 500_000
"""Most values of a file, each counted as often as it is referred to."""
_SHOWN = 80
_WHOLE = (int, np.integer)
_REAL = (int, float, np.integer, np.floating)
_CONTAINERS = (Mapping, list, tuple, set, frozenset)


class Rule(Protocol):
    """Description of a valid value."""

    def read(self, value: Any, name: str) -> Any:
        """Check `value` and return it in its plain type.

        Raises:
            InputError: naming `name`, the value and what it must be.
        """


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`."""

    least: int
    most: int

    def read(self, value: Any, name: str) -> int:
        """Check `value` and return it in its plain type (see `Rule.read`)."""
        if not isinstance(value, _WHOLE) or isinstance(value, bool):
            exact = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
            hint = f" (write {int(value)})" if exact else ""
            raise InputError(f"{name} = {shown(value)}: must be a whole number{hint}")
        if not self.least <= value <= self.most:
            rule = f"at least {self.least}" if value < self.least else f"at most {self.most}"
            raise InputError(f"{name} = {shown(value)}: must be {rule}")
        return int(value)


@dataclass(frozen=True)
class Number:
    """A finite number from `least` to `most`; `least` itself is left out if `above`, `most` if `below`."""

    least: float = -1e30
    most: float = 1e30
    above: bool = False
    below: bool = False

    def read(self, value: Any, name: str) -> float:
        """Check `value` and return it in its plain type (see `Rule.read`)."""
        if not isinstance(value, _REAL) or isinstance(value, bool):
            raise InputError(f"{name} = {shown(value)}: must be a number")
        if value != value:
            raise InputError(f"{name} = {shown(value)}: must be a finite number")
        if value < self.least or (self.above and value == self.least):
            raise InputError(
                f"{name} = {shown(value)}: must be {'above' if self.above else 'at least'} {self.least:g}"
            )
        if value > self.most or (self.below and value == self.most):
            raise InputError(
                f"{name} = {shown(value)}: must be {'below' if self.below else 'at most'} {self.most:g}"
            )
        return float(value)


@dataclass(frozen=True)
class Switch:
    """True or false, not as text or number."""

    def read(self, value: Any, name: str) -> bool:
        """Check `value` and return it in its plain type (see `Rule.read`)."""
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"{name} = {shown(value)}: must be true or false (not as text or number)")
        return bool(value)


class OneOf:
    """One of a few texts."""

    def __init__(self, *known: str) -> None:
        self.known = known

    def read(self, value: Any, name: str) -> str:
        """Check `value` and return it in its plain type (see `Rule.read`)."""
        if not isinstance(value, str) or value not in self.known:
            raise InputError(f"{name} = {shown(value)}: must be one of {', '.join(self.known)}")
        return str(value)


@dataclass(frozen=True)
class Optional:
    """None, or a value that `rule` accepts."""

    rule: Rule

    def read(self, value: Any, name: str) -> Any:
        """Check `value` and return it in its plain type (see `Rule.read`)."""
        return None if value is None else self.rule.read(value, name)


@dataclass(frozen=True)
class Items:
    """A list of up to `most` values that `rule` accepts."""

    rule: Rule
    most: int = 100_000

    def read(self, value: Any, name: str) -> list[Any]:
        """Check `value` and return it in its plain type (see `Rule.read`)."""
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} = {shown(value)}: must be a list")
        if len(value) > self.most:
            raise InputError(f"{name} has {len(value)} entries: must be at most {self.most}")
        return [self.rule.read(item, f"{name}[{index}]") for index, item in enumerate(value)]


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """Check that `value` is a dictionary whose keys are text, and return it.

    Raises:
        InputError: naming `name`.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a dictionary, not {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"{name} has the key {shown(key)}: keys must be text")
    return value


def check_size(value: Any, name: str) -> None:
    """Check that walking through nested lists and dictionaries ends soon, before anything does so.

    References to one object count as copies of it, as text or JSON they would be.

    Raises:
        InputError: more than MAX_DEPTH deep (or a list in itself), or more than MAX_VALUES values.
    """
    left, count = [(value, 0)], 0
    while left:
        item, depth = left.pop()
        parts: list[Any] = []
        if isinstance(item, Mapping):
            parts = [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            parts = list(item)
        count += len(parts)
        if depth > MAX_DEPTH:
            raise InputError(f"{name} holds values that are nested more than {MAX_DEPTH} deep")
        if count > MAX_VALUES:
            raise InputError(f"{name} holds more than {MAX_VALUES} values")
        left += [(part, depth + 1) for part in parts]


def shown(value: Any) -> str:
    """Format a value for an error message, in one short line."""
    if isinstance(value, _CONTAINERS):
        parts = value.values() if isinstance(value, Mapping) else value
        if len(value) > 8 or any(isinstance(part, _CONTAINERS) for part in parts):
            return f"a {type(value).__name__} of {len(value)} values"
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a whole number of {int(math.log10(abs(value))) + 1} digits"
    try:
        text = " ".join(repr(value[:_SHOWN] if isinstance(value, str | bytes) else value).split())
    except Exception:  # `repr` of somebody else's object can raise anything
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def shown_name(key: Any) -> str:
    """Format the key of a dictionary for an error message: text without quotes."""
    return shown(key)[1:-1] if isinstance(key, str) and len(key) < _SHOWN - 2 else shown(key)

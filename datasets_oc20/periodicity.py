"""Notices about the periodic directions of structures: no error, but often a mistake of whoever wrote them.

A slab that is not periodic loses the neighbours across its cell, and its energy and forces change. A full
cell without `pbc` is what programs leave behind that do not write it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

_LOG = logging.getLogger(__name__)
_SMALLEST_VOLUME = 1e-6
"""Å³; a cell below has no volume."""


def unused_cell(cell: np.ndarray, pbc: np.ndarray) -> bool:
    """Tell whether a structure has a whole cell `[3, 3]` (Å) and is periodic in no direction `[3]`."""
    if np.any(pbc):
        return False
    return bool(abs(np.linalg.det(np.reshape(cell, (3, 3)))) > _SMALLEST_VOLUME)


def as_text(pbc: tuple[bool, ...]) -> str:
    """Three of T and F."""
    return " ".join("T" if periodic else "F" for periodic in pbc)


@dataclass
class Periodicity:
    """The periodic directions of structures that are read one after the other.

    Attributes:
        found: by `pbc`: number of structures, and the name of the first.
        unused: number of structures with a whole cell and no periodic direction, and the name of the first.
        said: notices that were given.
    """

    found: dict[tuple[bool, ...], tuple[int, str]] = field(default_factory=dict)
    unused: tuple[int, str] = (0, "")
    said: set[str] = field(default_factory=set)

    def add(self, cell: np.ndarray, pbc: np.ndarray, name: str) -> None:
        """Take in one structure; `name` is what a notice calls it."""
        key = tuple(np.reshape(pbc, 3).tolist())
        count, first = self.found.get(key, (0, name))
        self.found[key] = count + 1, first
        if unused_cell(cell, np.reshape(pbc, 3)):
            self.unused = self.unused[0] + 1, self.unused[1] or name

    def merge(self, other: Periodicity) -> None:
        """Take in the structures of `other`, which come behind."""
        for key, (count, name) in other.found.items():
            mine, first = self.found.get(key, (0, name))
            self.found[key] = mine + count, first
        self.unused = self.unused[0] + other.unused[0], self.unused[1] or other.unused[1]

    def notices(self) -> dict[str, str]:
        """Notices by kind ("not periodic", "mixed")."""
        said = {}
        if self.unused[0]:
            said["not periodic"] = (
                f"{self.unused[1]}: has a whole cell but pbc F F F, so nothing is seen across its boundary; "
                "set pbc if it is a slab or a bulk"
            )
        if len(self.found) > 1:
            kinds = ", ".join(f"{as_text(key)} ({name})" for key, (_, name) in self.found.items())
            said["mixed"] = f"the structures have different periodic directions: {kinds}"
        return said

    def say(self, source: str, log: logging.Logger = _LOG) -> None:
        """Log each kind of notice once, naming `source`."""
        for kind, text in self.notices().items():
            if kind not in self.said:
                self.said.add(kind)
                log.warning("%s: %s.", source, text) if source else log.warning("%s.", text)

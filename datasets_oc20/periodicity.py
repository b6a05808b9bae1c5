"""Notices about the periodic directions of structures: no errors, but often mistakes in a file.

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


@dataclass
class Periodicity:
    """Periodic directions of structures that are read one after the other, and the notices about them.

    Attributes:
        directions: by `pbc`: number of structures, and the name of the first.
        unused_cells: number of structures with a whole cell and no periodic direction, and the name of the
            first.
        logged: kinds of notices that were given.
    """

    directions: dict[tuple[bool, ...], tuple[int, str]] = field(default_factory=dict)
    unused_cells: tuple[int, str] = (0, "")
    logged: set[str] = field(default_factory=set)

    def add(self, cell: np.ndarray, pbc: np.ndarray, name: str) -> None:
        """Add one structure.

        Args:
            cell: `[3, 3]` Å.
            pbc: `[3]` bool.
            name: names the structure in a notice.
        """
        key = tuple(np.reshape(pbc, 3).tolist())
        count, first = self.directions.get(key, (0, name))
        self.directions[key] = count + 1, first
        if unused_cell(cell, np.reshape(pbc, 3)):
            self.unused_cells = self.unused_cells[0] + 1, self.unused_cells[1] or name

    def merge(self, other: Periodicity) -> None:
        """Add the structures of `other`, which come after those added before."""
        for key, (count, name) in other.directions.items():
            mine, first = self.directions.get(key, (0, name))
            self.directions[key] = mine + count, first
        self.unused_cells = (
            self.unused_cells[0] + other.unused_cells[0],
            self.unused_cells[1] or other.unused_cells[1],
        )

    def notices(self) -> dict[str, str]:
        """Return notices by kind ("not periodic", "mixed")."""
        notices = {}
        if self.unused_cells[0]:
            notices["not periodic"] = (
                f"{self.unused_cells[1]}: has a whole cell but pbc F F F, so nothing is seen across its "
                "boundary; set pbc if it is a slab or a bulk"
            )
        if len(self.directions) > 1:
            kinds = ", ".join(
                f"{' '.join('T' if periodic else 'F' for periodic in pbc)} ({name})"
                for pbc, (_, name) in self.directions.items()
            )
            notices["mixed"] = f"the structures have different periodic directions: {kinds}"
        return notices

    def log(self, source: str, logger: logging.Logger = _LOG) -> None:
        """Log each kind of notice once, naming `source` (if it is not empty)."""
        for kind, text in self.notices().items():
            if kind not in self.logged:
                self.logged.add(kind)
                logger.warning("%s: %s.", source, text) if source else logger.warning("%s.", text)

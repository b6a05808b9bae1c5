"""Rules that name atoms in words: `last 2`, `CO`, `z<4.5`, `indices 0-17,20`."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.formula import Formula
from scipy.sparse.csgraph import connected_components

from datasets_oc20.errors import DataError

_HEIGHT = re.compile(r"([xyz])\s*(<=|>=|<|>)\s*(-?\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?)")
_ENDS = re.compile(r"(first|last)\s+(\d{1,7})")
_INDICES = re.compile(r"(?:indices\s+)?(\d{1,7}(?:-\d{1,7})?(?:\s*,\s*\d{1,7}(?:-\d{1,7})?)*)")
_FORMULA = re.compile(r"(?:[A-Z][a-z]?\d{0,4})+")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_BOND = 1.25
_KINDS = "'last 2', 'first 2', 'indices 0-17,20', 'z<4.5' (Å), a formula such as CO, or none"


@dataclass(frozen=True)
class AtomRule:
    """A rule that chooses atoms of a structure; nothing in it is evaluated as code.

    Args:
        text: `last N`, `first N`, `indices 0-17,20`, a comparison of a Cartesian coordinate in Å (`z<4.5`), a
            formula of atoms (`CO`), or `none`.

    Raises:
        DataError: another text.
    """

    text: str

    def __post_init__(self) -> None:
        text = self.text.strip()
        patterns = (_HEIGHT, _ENDS, _INDICES)
        is_formula = _FORMULA.fullmatch(text) is not None and all(
            symbol in chemical_symbols[1:] for symbol in re.findall("[A-Z][a-z]?", text)
        )
        if text != "none" and not is_formula and not any(pattern.fullmatch(text) for pattern in patterns):
            raise DataError(f"the rule {self.text[:60]!r} for atoms is not understood; give {_KINDS}.")

    @property
    def is_none(self) -> bool:
        """True for the rule that chooses no atom of any structure."""
        return self.text.strip() == "none"

    def choose(self, atoms: Atoms) -> np.ndarray:
        """Find the atoms, `[N]` bool.

        Raises:
            DataError: the structure has no such atoms, or which ones are meant cannot be told.
        """
        text = self.text.strip()
        natoms = len(atoms)
        chosen = np.zeros(natoms, dtype=bool)
        if self.is_none:
            return chosen
        if (match := _HEIGHT.fullmatch(text)) is not None:
            heights = atoms.positions[:, "xyz".index(match[1])]
            return np.asarray(_COMPARE[match[2]](heights, float(match[3])), dtype=bool)
        if (match := _ENDS.fullmatch(text)) is not None:
            number = int(match[2])
            if number > natoms:
                raise DataError(f"{text!r} asks for {number} atoms, but there are {natoms}")
            chosen[natoms - number :] = match[1] == "last"
            chosen[:number] |= match[1] == "first"
            return chosen
        if (match := _INDICES.fullmatch(text)) is not None:
            for part in match[1].split(","):
                first, _, last = part.strip().partition("-")
                if int(last or first) >= natoms or int(last or first) < int(first):
                    raise DataError(
                        f"the atoms {part.strip()} are asked for, but there are 0 to {natoms - 1}"
                    )
                chosen[int(first) : int(last or first) + 1] = True
            return chosen
        return self._of_formula(atoms, text)

    def _of_formula(self, atoms: Atoms, text: str) -> np.ndarray:
        """Find atoms of a formula: the only ones of their elements, the last, the first, or the topmost.

        The last, first or topmost ones must hang together, as the atoms of a molecule do.
        """
        wanted = Formula(text).count()
        symbols = np.array(atoms.get_chemical_symbols())
        size = sum(wanted.values())
        of_elements = np.isin(symbols, list(wanted))

        def fits(indices: np.ndarray) -> bool:
            return all((symbols[indices] == symbol).sum() == number for symbol, number in wanted.items())

        chosen = np.zeros(len(atoms), dtype=bool)
        only = np.flatnonzero(of_elements)
        places = np.arange(len(atoms))
        top = np.sort(np.argsort(atoms.positions[:, 2], kind="stable")[::-1][:size])
        fitting = {
            tuple(ends)
            for ends in (places[-size:], places[:size], top)
            if len(ends) == size and fits(ends) and _hang_together(atoms, ends)
        }
        if len(only) == size and fits(only):
            chosen[only] = True
        elif len(fitting) == 1:
            chosen[list(fitting.pop())] = True
        elif tuple(top) in fitting and len(fitting) == 2:  # the last or the first atoms are others
            chosen[top] = True
        else:
            raise DataError(
                f"{text} cannot be told from the other atoms (it is neither all atoms of its elements, nor "
                "clearly the last, first or topmost ones, bonded to each other); name the atoms, as in "
                "'last 2' or 'indices 30,31'"
            )
        return chosen


def _hang_together(atoms: Atoms, indices: np.ndarray) -> bool:
    """Tell whether bonds, of covalent radii and a quarter, connect atoms; periodic images count."""
    radii = covalent_radii[atoms.numbers[indices]]
    distances = atoms[indices].get_all_distances(mic=bool(atoms.cell.rank == 3))
    bonds = distances < _BOND * (radii[:, None] + radii[None, :])
    return int(connected_components(bonds, directed=False, return_labels=False)) == 1

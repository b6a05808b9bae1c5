"""Selection of frames in the language of ASE's databases: `natoms>5`, `Cu>0,energy<-10`, `relaxed=1`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.db.core import ops, parse_selection
from ase.db.row import AtomsRow

from datasets_oc20.errors import DataError


@dataclass(frozen=True)
class FrameSelection:
    """Conditions that a frame must fulfil; all of them count.

    Args:
        text: as `ase.db` takes them, separated by commas: comparisons of a number of atoms (`Cu>2`), of what
            ASE knows of a structure (`natoms`, `formula=Cu3Pt`, `volume`, `mass`, `energy`, `fmax`, `smax`,
            `charge`, `pbc=TTF`, in eV and Å) or of keys of the file; a key or formula alone asks for frames
            that have it.

    Raises:
        DataError: another text.
    """

    text: str

    def __post_init__(self) -> None:
        self._parsed()

    def _parsed(self) -> tuple[list[str], list[tuple[Any, str, Any]]]:
        try:
            if not self.text.strip():
                raise ValueError("it is empty")
            return parse_selection(self.text)
        except Exception as error:  # of ASE's parser, for whatever stands in the text
            raise DataError(
                f"the selection {self.text[:60]!r} is not understood ({error}); give conditions such as "
                "'natoms>5' or 'Cu>0,energy<-10'."
            ) from error

    def matches(self, atoms: Atoms) -> bool:
        """Tell whether a frame fulfils all conditions; one without a key that is asked for does not.

        Raises:
            DataError: a value of the frame cannot be compared so.
        """
        keys, comparisons = self._parsed()
        row = AtomsRow(atoms)
        values: Mapping[str, Any] = atoms.info
        if not all(key in values or row.get(key) is not None for key in keys):
            return False
        return all(self._holds(row, values, *comparison) for comparison in comparisons)

    def _holds(self, row: Any, values: Mapping[str, Any], key: Any, sign: str, wanted: Any) -> bool:
        if isinstance(key, int):  # an atomic number
            value: Any = np.count_nonzero(row.numbers == key)
        elif key == "pbc":
            value = "".join("FT"[int(flag)] for flag in row.pbc)
        else:
            value = values.get(key, row.get(key))
        if value is None:
            return False
        try:
            return bool(ops[sign](value, wanted))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"its {key} is {str(value)[:40]!r}, which cannot be compared as in {self.text!r}."
            ) from error

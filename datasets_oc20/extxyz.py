"""Reader of OC20's raw files: extended XYZ frames, read in whole columns.

ASE reads the same files, atom by atom; `tests/datasets_oc20/test_extxyz.py` compares the two. ASE itself
parses the comment line, so that keys like `pbe/energy` and text in quotes mean the same as in ASE.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers as ATOMIC_NUMBERS
from ase.io.extxyz import key_val_str_to_dict

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath, open_compressed

_USED_KEYS = re.compile(r"(?<![^\s])(?:energy|Lattice|Properties|pbc)\s*=")
_USED = {"energy", "Lattice", "Properties", "pbc"}
# Lines without escapes, brackets and odd keys: there these pairs are those that ASE finds, letter
# by letter. Most frames of a relaxation share all values but the energy.
_PAIR = re.compile(r'([A-Za-z_]\w*)=("[^"\\]*"|[^\s"\'{}\[\]\\=]+)')
_SIMPLE = re.compile(rf"\s*(?:{_PAIR.pattern}(?:\s+|$))+")
_MOVABLE = {"T": True, "F": False, "True": True, "False": False}
_COUNT = re.compile(r"[0-9]{1,8}")
_LARGEST_FILE = 4 << 30
_LARGEST_COMMENT = 1 << 20
_NEEDED_COLUMNS = {"species": 1, "pos": 3, "move_mask": 1, "tags": 1, "forces": 3}
_HINTS = {
    "tags": "tags tell slab from adsorbate and are kept apart from the frames in some releases: "
    "write them into the frames first",
    "move_mask": "it tells which atoms the relaxation held in place: write it into the frames first",
}


@dataclass(frozen=True)
class RawFrame:
    """One frame of a relaxation.

    Attributes:
        atomic_numbers: `[N]`.
        pos: `[N, 3]` Å.
        cell: `[3, 3]` Å, lattice vectors as rows.
        pbc: `[3]` bool.
        fixed: `[N]` bool, atoms that did not move.
        tags: `[N]` 0 subsurface, 1 surface, 2 adsorbate.
        forces: `[N, 3]` eV/Å.
        energy: total energy of DFT, eV.
        index: position in its file.
    """

    atomic_numbers: np.ndarray
    pos: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    fixed: np.ndarray
    tags: np.ndarray
    forces: np.ndarray
    energy: float
    index: int

    @property
    def max_free_force(self) -> float:
        """Largest force on an atom that is free to move, eV/Å; 0 without such an atom."""
        free = self.forces[~self.fixed]
        return float(np.sqrt((free * free).sum(axis=1).max())) if len(free) else 0.0

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by the names of the data object."""
        names = ("pos", "atomic_numbers", "cell", "pbc", "tags", "fixed", "forces")
        return {name: getattr(self, name) for name in names}


def read_text(path: AnyPath) -> str:
    """Read a plain or `.xz` text file; raise `DataError` when it is missing, damaged or truncated."""
    path = Path(path)
    try:
        with open_compressed(path, _LARGEST_FILE) as handle:
            return handle.read().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file.") from error


def read_frames(path: AnyPath) -> Iterator[RawFrame]:
    """Read the frames of an `.extxyz` or `.extxyz.xz` file, in order.

    Raises:
        DataError: a frame is incomplete, or a column, the cell or the energy is missing or not a
            number; the message names the file and the frame.
    """
    path = Path(path)
    lines = read_text(path).splitlines()
    start = index = 0
    while start < len(lines) and lines[start].strip():
        where = f"{path}, frame {index}"
        count = lines[start].strip()
        if not _COUNT.fullmatch(count) or int(count) == 0:
            raise DataError(f"{where}: {count[:40]!r} is not a number of atoms.")
        stop = start + 2 + int(count)
        if stop > len(lines):
            raise DataError(f"{where}: the file ends inside the frame; download it again.")
        yield _FrameParser(lines[start + 1], where).parse(lines[start + 2 : stop], index)
        start, index = stop, index + 1
    if index == 0:
        raise DataError(f"{path}: the file holds no frame.")
    if any(line.strip() for line in lines[start:]):
        raise DataError(f"{path}, frame {index}: there is an empty line before it; remove it.")


class _FrameParser:
    """The comment line of one frame, parsed, with which its rows are read.

    Args:
        comment: the second line of the frame.
        where: file and frame, for error messages.

    Raises:
        DataError: the line is not readable, or a key of ours is there twice with different values, of which
            ASE takes the last.
    """

    def __init__(self, comment: str, where: str) -> None:
        self._where = where
        if len(comment) > _LARGEST_COMMENT:
            raise DataError(f"{where}: the comment line has {len(comment)} characters, more than can be.")
        simple = self._parse_simple(comment)
        self._header: dict[str, Any] = self._parse_comment(comment) if simple is None else simple

    def parse(self, rows: list[str], index: int) -> RawFrame:
        """Parse the rows of all atoms; `index` is the position of the frame in its file."""
        columns, width = self._columns()
        table = [row.split() for row in rows]
        uneven = next((atom for atom, row in enumerate(table) if len(row) != width), None)
        if uneven is not None:
            raise self._error(f"atom {uneven} does not have the {width} columns that Properties lists")
        by_column = list(zip(*table, strict=True))

        def numbers(name: str, size: int) -> np.ndarray:
            first = columns[name]
            flat = np.empty((len(rows), size))
            try:
                for column in range(size):
                    flat[:, column] = by_column[first + column]
            except ValueError as error:
                raise self._error(f"column {name} holds something that is not a number") from error
            return flat

        species = by_column[columns["species"]]
        elements = {symbol: ATOMIC_NUMBERS.get(symbol.capitalize()) for symbol in set(species)}
        if None in elements.values():
            atom = next(number for number, symbol in enumerate(species) if elements[symbol] is None)
            raise self._error(f"atom {atom} is {species[atom]!r}, which is not an element")
        movable = by_column[columns["move_mask"]]
        if not set(movable) <= _MOVABLE.keys():
            raise self._error("column move_mask holds something other than T and F")
        tags = numbers("tags", 1)[:, 0]
        fractional = np.flatnonzero(tags != np.round(tags))
        if len(fractional):
            atom = fractional[0]
            raise self._error(f"atom {atom} has tag {tags[atom]:g}, not a whole number")
        return RawFrame(
            atomic_numbers=np.array([elements[symbol] for symbol in species]),
            pos=numbers("pos", 3),
            cell=self._floats("Lattice", 9).reshape(3, 3),
            pbc=self._periodic(),
            fixed=np.array([not _MOVABLE[flag] for flag in movable]),
            tags=tags.astype(np.int64),
            forces=numbers("forces", 3),
            energy=float(self._floats("energy", 1)[0]),
            index=index,
        )

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self._where}: {problem}.")

    def _parse_simple(self, comment: str) -> dict[str, Any] | None:
        """Parse a line without escapes, brackets and repeated keys; None for any other line."""
        if not _SIMPLE.fullmatch(comment):
            return None
        pairs = [(key, value) for key, value in _PAIR.findall(comment) if key in _USED]
        if len({key for key, _ in pairs}) < len(pairs):
            return None
        header = {}
        for key, value in pairs:
            try:
                header[key] = _parse_pair(key, value)
            except (ValueError, IndexError):
                header[key] = self._by_ase(f"{key}={value}")[key]  # raises the same with a sentence
        return header

    def _parse_comment(self, comment: str) -> dict[str, Any]:
        """Parse any line as ASE does, and refuse contradicting repeated keys."""
        header = self._by_ase(comment)
        starts = [match.start() for match in _USED_KEYS.finditer(comment)]
        if len({comment[start:].split("=", 1)[0].strip() for start in starts}) < len(starts):
            for start in starts[1:]:
                key = comment[start:].split("=", 1)[0].strip()
                # Text in quotes before `start` is open there and swallows nothing that was read before.
                try:
                    before = key_val_str_to_dict(comment[:start])
                except (ValueError, IndexError, RecursionError):
                    continue
                if key in before and key in header and not np.array_equal(before[key], header[key]):
                    raise self._error(f"the key {key} is there twice with different values; remove one")
        return header

    def _by_ase(self, comment: str) -> dict[str, Any]:
        try:
            values: dict[str, Any] = key_val_str_to_dict(comment)
        except (ValueError, IndexError, RecursionError) as error:
            hint = "; Lattice must hold 9 numbers" if "Lattice" in str(error) else ""
            raise self._error(f"the comment line is not readable as extended XYZ{hint}") from error
        return values

    def _columns(self) -> tuple[dict[str, int], int]:
        """First column of every property, and the number of all columns."""
        parts = str(self._header.get("Properties", "")).split(":")
        starts: dict[str, int] = {}
        sizes: dict[str, int] = {}
        total = 0
        for name, size in zip(parts[0::3], parts[2::3], strict=False):
            if not _COUNT.fullmatch(size):
                raise self._error("the Properties of the frame are not readable")
            starts[name], sizes[name] = total, int(size)
            total += int(size)
        for name, needed in _NEEDED_COLUMNS.items():
            if sizes.get(name) != needed:
                hint = f"; {_HINTS[name]}" if name in _HINTS else ""
                raise self._error(f"the frame has no column {name}{hint}")
        return starts, total

    def _floats(self, key: str, count: int) -> np.ndarray:
        """Return the `count` numbers of a key, float64."""
        if key not in self._header:
            raise self._error(f"the frame has no {key}")
        values = np.asarray(self._header[key])
        if values.dtype.kind not in "iuf":
            raise self._error(f"{key} holds something that is not a number")
        if values.size != count:
            raise self._error(f"{key} holds {values.size} numbers instead of {count}")
        # ASE has 3 by 3 values in the order of Fortran.
        return values.astype(np.float64).reshape(-1, order="F")

    def _periodic(self) -> np.ndarray:
        """Return `pbc`, or True in all directions where it is not written, as the format has it."""
        given = self._header.get("pbc", True)
        flags = (
            np.asarray(given) if isinstance(given, bool | list | np.ndarray | np.generic) else np.array("")
        )
        possible = flags.dtype.kind in "bi" and flags.size in (1, 3)
        if not possible or not ((flags == 0) | (flags == 1)).all():
            raise self._error(f"pbc is {str(given)[:40]!r}, not three of T and F")
        return np.array(np.broadcast_to(flags.astype(bool).reshape(-1), 3))


@lru_cache(maxsize=256)
def _parse_pair(key: str, value: str) -> Any:
    """Parse one pair as ASE does; the frames of a relaxation repeat most values."""
    return key_val_str_to_dict(f"{key}={value}")[key]

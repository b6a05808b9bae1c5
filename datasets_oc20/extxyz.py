"""The raw files of OC20: extended XYZ frames, read in whole columns.

ASE reads the same files, atom by atom; `tests/datasets_oc20/test_extxyz.py` compares the two.
"""

import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers as ATOMIC_NUMBERS

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath

_PAIR = re.compile(r'([\w-]+)=("[^"]*"|\S+)')
_NEEDED_COLUMNS = {"species": 1, "pos": 3, "move_mask": 1, "tags": 1, "forces": 3}
_HINTS = {
    "tags": "tags tell slab from adsorbate and are kept apart from the frames in some releases: "
    "write them into the frames first",
    "move_mask": "it tells which atoms the relaxation held in place: write it into the frames first",
}


@dataclass(frozen=True)
class RawFrame:
    """One frame of a relaxation.

    `atomic_numbers [N]`, `pos [N,3]` Å, `cell [3,3]` Å (rows), `pbc [3]`, `fixed [N]` (not movable),
    `tags [N]`, `forces [N,3]` eV/Å, `energy` eV (DFT total), `index` the position in its file.
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
        """Largest force on an atom that is free to move, eV/Å."""
        free = self.forces[~self.fixed]
        return float(np.sqrt((free * free).sum(axis=1).max())) if len(free) else 0.0


def read_text(path: AnyPath) -> str:
    """The text of a plain or `.xz` file; raises `DataError` when it is missing, damaged or truncated."""
    path = Path(path)
    try:
        if path.suffix == ".xz":
            with lzma.open(path, "rt", encoding="utf-8") as handle:
                return handle.read()
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: the file is truncated or damaged; download it again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file.") from error


def read_frames(path: AnyPath) -> Iterator[RawFrame]:
    """The frames of an `.extxyz` or `.extxyz.xz` file, in order.

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
        if not count.isdigit() or int(count) == 0:
            raise DataError(f"{where}: {count[:40]!r} is not a number of atoms.")
        stop = start + 2 + int(count)
        if stop > len(lines):
            raise DataError(f"{where}: the file ends inside the frame; download it again.")
        yield _parse_frame(lines[start + 1], lines[start + 2 : stop], index, where)
        start, index = stop, index + 1
    if index == 0:
        raise DataError(f"{path}: the file holds no frame.")
    if any(line.strip() for line in lines[start:]):
        raise DataError(f"{path}, frame {index}: there is an empty line before it; remove it.")


def _parse_frame(comment: str, rows: list[str], index: int, where: str) -> RawFrame:
    header = {key: value.strip('"') for key, value in _PAIR.findall(comment)}
    columns = _column_starts(header, where)
    width = columns["total"]
    table = [row.split() for row in rows]
    uneven = next((atom for atom, row in enumerate(table) if len(row) != width), None)
    if uneven is not None:
        raise DataError(f"{where}: atom {uneven} does not have the {width} columns that Properties lists.")
    by_column = list(zip(*table, strict=True))

    def numbers(name: str, size: int) -> np.ndarray:
        first = columns[name]
        flat = np.empty((len(rows), size))
        try:
            for column in range(size):
                flat[:, column] = by_column[first + column]
        except ValueError as error:
            raise DataError(f"{where}: column {name} holds something that is not a number.") from error
        return flat

    symbols = by_column[columns["species"]]
    unknown = next((number for number, symbol in enumerate(symbols) if symbol not in ATOMIC_NUMBERS), None)
    if unknown is not None:
        raise DataError(f"{where}: atom {unknown} is {symbols[unknown]!r}, which is not an element.")
    movable = by_column[columns["move_mask"]]
    if not set(movable) <= {"T", "F"}:
        raise DataError(f"{where}: column move_mask holds something other than T and F.")
    return RawFrame(
        atomic_numbers=np.array([ATOMIC_NUMBERS[symbol] for symbol in symbols]),
        pos=numbers("pos", 3),
        cell=_floats(header, "Lattice", 9, where).reshape(3, 3),
        pbc=_periodic(header, where),
        fixed=np.array([flag == "F" for flag in movable]),
        tags=numbers("tags", 1)[:, 0].astype(np.int64),
        forces=numbers("forces", 3),
        energy=float(_floats(header, "energy", 1, where)[0]),
        index=index,
    )


def _column_starts(header: dict[str, str], where: str) -> dict[str, int]:
    """First column of every property, and the number of columns as "total"."""
    parts = header.get("Properties", "").split(":")
    starts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    total = 0
    for name, size in zip(parts[0::3], parts[2::3], strict=False):
        if not size.isdigit():
            raise DataError(f"{where}: the Properties of the frame are not readable.")
        starts[name], sizes[name] = total, int(size)
        total += int(size)
    for name, needed in _NEEDED_COLUMNS.items():
        if sizes.get(name) != needed:
            hint = f"; {_HINTS[name]}" if name in _HINTS else ""
            raise DataError(f"{where}: the frame has no column {name}{hint}.")
    return {**starts, "total": total}


def _floats(header: dict[str, str], key: str, count: int, where: str) -> np.ndarray:
    try:
        values = np.array(header[key].split(), dtype=np.float64)
    except KeyError as error:
        raise DataError(f"{where}: the frame has no {key}.") from error
    except ValueError as error:
        raise DataError(f"{where}: {key} holds something that is not a number.") from error
    if values.shape != (count,):
        raise DataError(f"{where}: {key} holds {values.size} numbers instead of {count}.")
    return values


def _periodic(header: dict[str, str], where: str) -> np.ndarray:
    """`pbc`, or True in all directions where it is not written, as the extended XYZ format has it."""
    flags = header.get("pbc", "T T T").split()
    if len(flags) != 3 or not set(flags) <= {"T", "F"}:
        raise DataError(f"{where}: pbc is {header.get('pbc')!r}, not three of T and F.")
    return np.array([flag == "T" for flag in flags])

"""Files to import: those that are named, and in folders those that may hold energies."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets_oc20.errors import DataError
from datasets_oc20.own_data.reading import LMDB, find_format
from datasets_oc20.structure_files import COMPRESSED

CARRIERS = frozenset(
    {
        LMDB, "abinit-gsr", "abinit-out", "acemolecule-out", "aims-output", "castep-castep", "castep-md",
        "crystal", "dacapo-text", "db", "elk", "espresso-out", "extxyz", "gamess-us-out", "gaussian-out",
        "gpaw-out", "json", "nwchem-out", "onetep-out", "orca-output", "qbox", "traj", "turbomole-gradient",
        "vasp-out", "vasp-xml",
    }
)  # fmt: skip
"""Formats that can hold energies; others, such as POSCAR and CIF, hold structures only."""
_RESULT_NAMES = re.compile(r"OUTCAR|vasprun|\.(?:traj|db|extxyz|lmdb|aselmdb|pwo)$")
REPORT_ENDING = ".import.json"
_PART_ENDINGS = (".val", ".test")
"""Ends of the names of the other parts of a split (`importer.part_files`), before that of the file."""


@dataclass(frozen=True)
class Source:
    """One calculation or set of structures.

    Attributes:
        number: place among all sources.
        name: path for reports, as it was named or found.
        system: name for the system of a trajectory in it.
        paths: the file, and files of the same calculation that are read where the first is not whole.
        size: bytes of the first file.
    """

    number: int
    name: str
    system: str
    paths: tuple[Path, ...]
    size: int


@dataclass
class Found:
    """Files of an import.

    Attributes:
        sources: the sources, in order.
        missing: name and reason of paths that cannot be read at all.
        ignored: names of files in folders that hold no energies by their name or format.
        merged: names of files of a calculation of which another file is read.
    """

    sources: list[Source]
    missing: list[tuple[str, str]]
    ignored: list[str]
    merged: list[str]


def find_sources(paths: Iterable[str | os.PathLike[str]]) -> Found:
    """Find the files to read; folders are searched with all folders in them.

    Where `vasprun.xml` and `OUTCAR` of one calculation lie side by side in a folder, the first is read, which
    holds settings and constraints, and the other where it is not whole. Links to folders are followed. Hidden
    files are left out, and LMDB files that an import wrote.

    Args:
        paths: files and folders; one that is named twice is read once.

    Raises:
        DataError: nothing is named.
    """
    found = Found([], [], [], [])
    listed: list[tuple[Path, ...]] = []
    seen: set[str] = set()
    named = [Path(path) for path in paths]
    if not named:
        raise DataError("no file is named; give files or folders with results of DFT.")
    for path in named:
        try:
            if path.is_dir():
                files = _files_of(path, found)
                if not files:
                    found.missing.append((shown(path), "the folder holds no results that ASE reads"))
            elif not os.path.lexists(path):
                found.missing.append((shown(path), "there is no such file"))
                continue
            else:
                files = [(path,)]
        except (OSError, ValueError) as error:
            found.missing.append((shown(path), _unreadable(error)))
            continue
        for group in files:
            real = os.path.realpath(group[0])
            if real not in seen:
                seen.add(real)
                listed.append(group)
    # With the name of one folder more, so that systems of several imports are told apart.
    base = (
        os.path.dirname(os.path.commonpath([os.path.abspath(group[0].parent) for group in listed]))
        if listed
        else ""
    )
    for number, group in enumerate(listed):
        size = group[0].stat().st_size if group[0].is_file() else 0
        system = shown(_system_name(group[0], base))
        found.sources.append(Source(number, shown(group[0]), system, group, size))
    return found


def shown(path: str | os.PathLike[str]) -> str:
    """Write a path as text that can be printed and stored, with escapes for bytes that are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _unreadable(error: OSError | ValueError) -> str:
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def _files_of(folder: Path, found: Found) -> list[tuple[Path, ...]]:
    """List the files of a folder that may hold energies, each with the others of its calculation."""
    groups: list[tuple[Path, ...]] = []
    visited = {os.path.realpath(folder)}

    def is_new(place: str) -> bool:
        """Tell whether a folder was not visited yet: links may lead in a circle."""
        real = os.path.realpath(place)
        new = real not in visited
        visited.add(real)
        return new

    def note(error: OSError) -> None:
        found.missing.append((shown(error.filename), _unreadable(error)))

    def is_carrier(path: Path) -> bool:
        try:
            return _may_hold_energies(path, found)
        except OSError as error:  # a folder that lists its files and does not open them
            found.missing.append((shown(path), _unreadable(error)))
            return False

    for place, folders, names in os.walk(folder, onerror=note, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in visible if is_new(os.path.join(place, name))]
        files = {
            name: Path(place, name)
            for name in sorted(names)
            if not name.startswith(".") and not name.endswith(REPORT_ENDING) and name != "lock.mdb"
        }
        carriers = {name: path for name, path in files.items() if is_carrier(path)}
        for name, path in carriers.items():
            outcar = _outcar_of(name, carriers)
            if outcar is not None:
                groups.append((path, carriers[outcar]))
            elif not any(_outcar_of(other, carriers) == name for other in carriers):
                groups.append((path,))
            else:
                found.merged.append(shown(path))
    return groups


def _outcar_of(name: str, names: Iterable[str]) -> str | None:
    """Return the name of the OUTCAR of the calculation of a `vasprun.xml`, if it is among `names`."""
    bare = _bare(name)
    if not (bare.startswith("vasprun") and bare.endswith(".xml")):
        return None
    expected = "OUTCAR" + bare.removeprefix("vasprun").removesuffix(".xml")
    return next((other for other in names if _bare(other) == expected), None)


def _may_hold_energies(path: Path, found: Found) -> bool:
    """Tell whether a file of a folder is to be read; one that is named like a result always is."""
    if _is_imported(path) or not path.is_file():
        found.ignored.append(shown(path))
        return False
    if names_result(path.name):
        return True
    try:
        is_carrier = find_format(path) in CARRIERS
        if is_carrier and _bare(path.name).endswith(".json"):
            with path.open("rb") as file:
                is_carrier = path.suffix in COMPRESSED or b'"numbers"' in file.read(1 << 16)
    except (DataError, OSError):
        is_carrier = False
    if not is_carrier:
        found.ignored.append(shown(path))
    return is_carrier


def _is_imported(path: Path) -> bool:
    """Tell whether an import wrote a file, or part of a split, whose report lies beside the first part."""
    stem = Path(path.stem)
    first = path.with_name(f"{stem.stem}{path.suffix}") if stem.suffix in _PART_ENDINGS else path
    return any(Path(f"{part}{REPORT_ENDING}").exists() for part in (path, first))


def names_result(name: str) -> bool:
    """Tell whether a file is named like a result of DFT or a set of frames."""
    return _RESULT_NAMES.search(_bare(name)) is not None


def _bare(name: str) -> str:
    """Return a name without the ending of compressed files."""
    ending = next((ending for ending in COMPRESSED if name.endswith(ending)), "")
    return name.removesuffix(ending)


def _system_name(path: Path, base: str) -> str:
    """Name the system of a calculation: its folder where the file has the name that its code gives to all."""
    relative = Path(os.path.relpath(os.path.abspath(path), base))
    bare = _bare(relative.name)
    if bare in ("OUTCAR", "vasprun.xml") and len(relative.parts) > 1:
        return str(relative.parent)
    for ending in (
        ".extxyz",
        ".xyz",
        ".traj",
        ".db",
        ".json",
        ".out",
        ".pwo",
        ".txt",
        ".xml",
        ".lmdb",
        ".aselmdb",
    ):
        bare = bare.removesuffix(ending)
    return str(relative.with_name(bare or relative.name))

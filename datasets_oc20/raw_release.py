"""The two layouts of OC20's raw releases, as a list of files with what belongs to each.

Trajectories: `<system_id>.extxyz[.xz]`, one relaxation each, and one `system.txt` with lines
`system_id,reference_energy`. S2EF chunks: `<n>.extxyz[.xz]` with frames of many systems, each beside a
`<n>.txt[.xz]` with one line `system_id,frame<number>,reference_energy` per frame.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from datasets_oc20.errors import DataError
from datasets_oc20.extxyz import read_text
from datasets_oc20.untrusted import AnyPath


@dataclass(frozen=True)
class RawFile:
    """One file of frames: a relaxation (`system` set) or a chunk (`index_file` set).

    `reference_energy` (eV) is None where only total energies are asked for.
    """

    path: Path
    system: str | None = None
    reference_energy: float | None = None
    index_file: Path | None = None


def read_references(folder: AnyPath) -> dict[str, float]:
    """The reference energy (eV) of every system in `folder/system.txt`."""
    folder = Path(folder)
    path = folder / "system.txt"
    references = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            parts = line.split(",")
            if len(parts) != 2:
                raise DataError(f"{path}, line {number}: expected 'system_id,reference_energy'.")
            references[parts[0].strip()] = _energy(parts[1], f"{path}, line {number}")
    return references


def read_index(path: AnyPath) -> list[tuple[str, int, float]]:
    """(system, frame, reference energy in eV) for every frame of a chunk."""
    path = Path(path)
    entries = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        parts = [part.strip() for part in line.split(",")]
        frame = parts[1].removeprefix("frame") if len(parts) == 3 else ""
        if not frame.isdigit():
            raise DataError(f"{path}, line {number}: expected 'system_id,frame0,reference_energy'.")
        entries.append((parts[0], int(frame), _energy(parts[2], f"{path}, line {number}")))
    return entries


def list_raw_files(
    folder: AnyPath, need_references: bool, systems: Collection[str] | None, exclude: Collection[str]
) -> list[RawFile]:
    """The files of `folder` that hold the wanted systems, sorted.

    The archives of the release unpack to a folder in a folder of the same name; either may be given.

    Raises:
        DataError: missing folder or frames, a wanted system without a file, a file without its reference.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder.")
    inner = [] if _frames_in(folder) else [path for path in folder.iterdir() if _frames_in(path)]
    if len(inner) == 1:
        folder = inner[0]
    paths = _frames_in(folder)
    if not paths:
        raise DataError(f"{folder}: the folder holds no *.extxyz or *.extxyz.xz file.")
    indices = {path: _index_of(path) for path in paths}
    if not (folder / "system.txt").exists() and any(indices.values()):
        missing = next((path for path, index in indices.items() if index is None), None)
        if missing is not None:
            raise DataError(f"{missing}: there is no {_stem(missing)}.txt with the systems of its frames.")
        return [RawFile(path, index_file=index) for path, index in indices.items()]
    return _trajectories(folder, paths, need_references, systems, exclude)


def _trajectories(
    folder: Path, paths: list[Path], need: bool, systems: Collection[str] | None, exclude: Collection[str]
) -> list[RawFile]:
    by_system = {_stem(path): path for path in paths}
    unknown = sorted({*(systems or ()), *exclude} - by_system.keys())
    if unknown:
        raise DataError(f"{folder}: there is no file for system {unknown[0]}.")
    wanted = [name for name in by_system if (systems is None or name in systems) and name not in exclude]
    if not wanted:
        raise DataError(f"{folder}: every system is excluded.")
    references = read_references(folder) if need else {}
    for name in wanted:
        if need and name not in references:
            raise DataError(f"{folder / 'system.txt'}: there is no reference energy for system {name}.")
    return [RawFile(by_system[name], system=name, reference_energy=references.get(name)) for name in wanted]


def _frames_in(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.extxyz"), *folder.glob("*.extxyz.xz")])


def _stem(path: Path) -> str:
    return path.name.removesuffix(".xz").removesuffix(".extxyz")


def _index_of(path: Path) -> Path | None:
    candidates = [path.with_name(_stem(path) + suffix) for suffix in (".txt", ".txt.xz")]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _energy(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(f"{where}: the reference energy {text.strip()!r} is not a number.") from error
    if value != value or abs(value) == float("inf"):
        raise DataError(f"{where}: the reference energy is not finite.")
    return value

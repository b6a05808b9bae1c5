"""OC20's raw releases: their two layouts as a list of files with labels, and the names of adsorbates.

Trajectories: `<system_id>.extxyz[.xz]`, one relaxation each, and one `system.txt` with lines
`system_id,reference_energy`. S2EF chunks: `<n>.extxyz[.xz]` with frames of many systems, each beside a
`<n>.txt[.xz]` with one line `system_id,frame<number>,reference_energy` per frame.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from datasets_oc20.errors import DataError
from datasets_oc20.extxyz import read_text
from datasets_oc20.safe_pickle import RefusedPickleError, load_inert
from datasets_oc20.untrusted import AnyPath


@dataclass(frozen=True)
class RawFile:
    """One file of frames: a relaxation (`system` set) or a chunk (`index_file` set).

    Attributes:
        path: the `.extxyz` or `.extxyz.xz` file.
        system: id of the system of all frames; None for a chunk.
        reference_energy: eV; None for a chunk, and where only total energies are asked for.
        index_file: the labels of the frames of a chunk; None for a relaxation.
    """

    path: Path
    system: str | None = None
    reference_energy: float | None = None
    index_file: Path | None = None

    def labels(self, count: int) -> list[tuple[str, int, float]]:
        """Return (system, frame number, reference energy in eV) of every frame.

        Args:
            count: number of frames in the file.

        Raises:
            DataError: the index file is damaged or has another number of lines.
        """
        if self.index_file is None:
            return [(self.system or "", index, self.reference_energy or 0.0) for index in range(count)]
        labels = read_index(self.index_file)
        if len(labels) != count:
            raise DataError(
                f"{self.index_file}: {len(labels)} lines for the {count} frames of {self.path.name}; one of "
                "the two is incomplete."
            )
        return labels


def read_references(folder: AnyPath) -> dict[str, float]:
    """Read the reference energy (eV) of every system in `folder/system.txt`.

    Raises:
        DataError: the file is missing, or a line is not `system_id,reference_energy`.
    """
    path = Path(folder) / "system.txt"
    references = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            parts = line.split(",")
            if len(parts) != 2:
                raise DataError(f"{path}, line {number}: expected 'system_id,reference_energy'.")
            references[parts[0].strip()] = _parse_energy(parts[1], f"{path}, line {number}")
    return references


def read_index(path: AnyPath) -> list[tuple[str, int, float]]:
    """Read (system, frame number, reference energy in eV) of every frame of a chunk.

    Raises:
        DataError: the file is missing, or a line is not `system_id,frame<number>,reference_energy`.
    """
    path = Path(path)
    entries = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        parts = [part.strip() for part in line.split(",")]
        frame = parts[1].removeprefix("frame") if len(parts) == 3 else ""
        if not frame.isdigit():
            raise DataError(f"{path}, line {number}: expected 'system_id,frame0,reference_energy'.")
        entries.append((parts[0], int(frame), _parse_energy(parts[2], f"{path}, line {number}")))
    return entries


def _parse_energy(text: str, where: str) -> float:
    try:
        energy = float(text)
    except ValueError as error:
        raise DataError(f"{where}: the reference energy {text.strip()!r} is not a number.") from error
    if not math.isfinite(energy):
        raise DataError(f"{where}: the reference energy is not finite.")
    return energy


def list_raw_files(
    folder: AnyPath, need_references: bool, systems: Collection[str] | None, exclude: Collection[str]
) -> list[RawFile]:
    """List the files of `folder` that hold the selected systems, sorted.

    The archives of the release unpack to a folder in a folder of the same name; either may be given.

    Args:
        folder: the unpacked release.
        need_references: read the reference energies of trajectories.
        systems: only these systems; None for all.
        exclude: all but these systems.

    Raises:
        DataError: missing folder or frames, a selected system without a file, a file without its reference.
    """

    def frame_files(folder: Path) -> list[Path]:
        return sorted([*folder.glob("*.extxyz"), *folder.glob("*.extxyz.xz")])

    def stem(path: Path) -> str:
        return path.name.removesuffix(".xz").removesuffix(".extxyz")

    def index_file(path: Path) -> Path | None:
        candidates = [path.with_name(stem(path) + suffix) for suffix in (".txt", ".txt.xz")]
        return next((candidate for candidate in candidates if candidate.exists()), None)

    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder.")
    inner = [] if frame_files(folder) else [path for path in folder.iterdir() if frame_files(path)]
    if len(inner) == 1:
        folder = inner[0]
    paths = frame_files(folder)
    if not paths:
        raise DataError(f"{folder}: the folder holds no *.extxyz or *.extxyz.xz file.")
    indices = {path: index_file(path) for path in paths}
    if not (folder / "system.txt").exists() and any(indices.values()):
        missing = next((path for path, index in indices.items() if index is None), None)
        if missing is not None:
            raise DataError(f"{missing}: there is no {stem(missing)}.txt with the systems of its frames.")
        return [RawFile(path, index_file=index) for path, index in indices.items()]
    trajectories = {stem(path): path for path in paths}
    return _list_trajectories(folder, trajectories, need_references, systems, exclude)


def _list_trajectories(
    folder: Path,
    trajectories: dict[str, Path],
    need_references: bool,
    systems: Collection[str] | None,
    exclude: Collection[str],
) -> list[RawFile]:
    """Select trajectories (file by system) and give them their reference energies."""
    unknown = sorted({*(systems or ()), *exclude} - trajectories.keys())
    if unknown:
        raise DataError(f"{folder}: there is no file for system {unknown[0]}.")
    selected = [name for name in trajectories if (systems is None or name in systems) and name not in exclude]
    if not selected:
        raise DataError(f"{folder}: every system is excluded.")
    references = read_references(folder) if need_references else {}
    for name in selected:
        if need_references and name not in references:
            raise DataError(f"{folder / 'system.txt'}: there is no reference energy for system {name}.")
    return [
        RawFile(trajectories[name], system=name, reference_energy=references.get(name)) for name in selected
    ]


def read_adsorbate_names(path: AnyPath) -> dict[str, str]:
    """Read the adsorbate of every system, which the LMDB files do not hold.

    Args:
        path: a JSON object such as `{"random1447590": "*CH2*O"}`, or OC20's `oc20_data_mapping.pkl`, of which
            `ads_symbols` is read. The pickle is read as data; one that would run code is refused.

    Returns:
        The adsorbate by `sid`.

    Raises:
        DataError: the file is neither, or has no names.
        OSError: it is missing or unreadable.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        table: Any = load_inert(content) if path.suffix == ".pkl" else orjson.loads(content)
    except (RefusedPickleError, orjson.JSONDecodeError) as error:
        raise DataError(f"{path}: the names of adsorbates cannot be read ({error}).") from error
    names = {}
    for sid, value in table.items() if isinstance(table, dict) else []:
        name = value.get("ads_symbols") if isinstance(value, dict) else value
        if not isinstance(name, str):
            raise DataError(f"{path}: system {sid} has no name of an adsorbate; give sid and name.")
        names[str(sid)] = name
    if not names:
        raise DataError(f"{path}: there are no names of adsorbates by system in it.")
    return names


def adsorbate_of(sid: str, names: dict[str, str]) -> str | None:
    """Look up the adsorbate of a system; OC20's LMDB files have `17` where its tables have `random17`.

    Args:
        sid: id of the system.
        names: adsorbate by `sid`, as `read_adsorbate_names` returns.
    """
    return names.get(sid) or names.get(f"random{sid}")

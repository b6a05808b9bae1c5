"""Reading, labelling and packing of one source, in a process of its own or divided over several."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from datasets_oc20.errors import DataError
from datasets_oc20.own_data.dft_settings import Calculation
from datasets_oc20.own_data.discovery import Source, shown
from datasets_oc20.own_data.frame_facts import FrameFacts, Origins, RunFinder
from datasets_oc20.own_data.labels import Labelled, LabelOptions, label
from datasets_oc20.own_data.reading import LMDB, FilePart, SourceFile, UnreadableError, is_divisible
from datasets_oc20.structure_files import reason_of
from datasets_oc20.structure_record import pack
from datasets_oc20.untrusted import AnyPath
from datasets_oc20.workers import parallel_map

_COLLECTIONS = {"extxyz", "db", "json", LMDB}
"""Formats that hold any structures; others hold the steps of one calculation."""
LARGE_SOURCE = 1 << 25
"""Bytes from which a file is divided over several processes; below, starting them takes as long."""
_PART = 500
"""Frames that a process reads at a time."""
_WAITING = 16
"""Parts that are read ahead, so that memory holds no more of them."""
_MOST_BAD_FRAMES = 1000


@dataclass
class Dropped:
    """A frame, or a file, that is not used.

    Attributes:
        file: name of the file.
        index: place of the frame in the file; None for the file, or the rest of it.
        reason: why.
    """

    file: str
    index: int | None
    reason: str


@dataclass
class SourceResult:
    """Frames, dropped frames and settings of one source.

    Attributes:
        source: the source.
        file: name of the file that was read.
        frames: facts of the frames that can be used.
        dropped: the others.
        calculation: settings of the calculation.
        energy_kind: kind that the file declares, or None.
        not_selected: number of frames that `LabelOptions.select` leaves out.
    """

    source: Source
    file: str
    frames: list[FrameFacts] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    calculation: Calculation = field(default_factory=Calculation)
    energy_kind: str | None = None
    not_selected: int = 0


def is_divided(source: Source) -> bool:
    """Tell whether several processes read parts of a source: it is large, and can be read from any frame."""
    try:
        return source.size >= LARGE_SOURCE and is_divisible(source.paths[0])
    except (DataError, OSError):  # told when it is read
        return False


def part_file(folder: AnyPath, source: Source) -> Path:
    """Path of the records of a source."""
    return Path(folder) / f"{source.number:08d}.part"


def read_source(
    source: Source,
    options: LabelOptions,
    folder: AnyPath,
    progress: Callable[[int], None] | None = None,
    needs_energy: bool = True,
    num_workers: int | None = 1,
) -> SourceResult:
    """Read a source and write the packed records of its usable frames to `part_file`.

    Where its first file is not whole and another file of the same calculation gives more, that one is taken.

    Args:
        source: the source.
        options: keys, units and rules.
        folder: folder of the parts.
        progress: called with the number of frames read so far.
        needs_energy: drop frames without an energy.
        num_workers: number of processes that read a large file; None takes one per core.
    """
    best: SourceResult | None = None
    path = part_file(folder, source)
    for file in source.paths:
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as records:
            result = _SourceReader(source, file, options, needs_energy, num_workers).read(records, progress)
        if best is None or len(result.frames) > len(best.frames):
            if best is not None:
                result.dropped = [*best.dropped, *result.dropped]
            best = result
            temporary.replace(path)
        else:
            temporary.unlink()
        if best.frames and not best.dropped:
            break
    assert best is not None
    return best


@dataclass
class _Examined:
    """A frame, read and labelled.

    Attributes:
        index: place in its file; None for the rest of the file.
        problem: reason why it is not used, or empty.
        is_unreadable: the problem is that it could not be read.
        labelled: fields of its record; None if it is not used, or not selected.
        facts: None likewise.
    """

    index: int | None
    problem: str = ""
    is_unreadable: bool = False
    labelled: Labelled | None = None
    facts: FrameFacts | None = None


def _examine(
    file: SourceFile, options: LabelOptions, needs_energy: bool, part: FilePart | None = None
) -> Iterator[_Examined]:
    """Read and label the frames of a file or of a part of it."""
    try:
        with contextlib.closing(file.frames(part)) as frames:
            for frame in frames:
                if frame.problem or frame.atoms is None:
                    yield _Examined(frame.index, frame.problem, frame.atoms is None)
                    continue
                try:
                    if options.select is not None and not options.select.matches(frame.atoms):
                        yield _Examined(frame.index)
                        continue
                    labelled = label(frame.atoms, options, needs_energy)
                    facts = FrameFacts.of(frame.index, labelled.fields)
                except DataError as error:
                    yield _Examined(frame.index, str(error).rstrip("."))
                    continue
                except Exception as error:  # values of a kind that nothing expects end no other frame
                    yield _Examined(frame.index, f"its values cannot be used ({reason_of(error)})")
                    continue
                yield _Examined(frame.index, labelled=labelled, facts=facts)
    except UnreadableError as error:
        yield _Examined(None, str(error))
    except OSError as error:
        yield _Examined(None, error.strerror or str(error))


def _examine_part(
    part: FilePart, path: Path, options: LabelOptions, needs_energy: bool
) -> tuple[list[_Examined], str | None, Calculation]:
    """Read and label a part of a file in another process.

    Returns:
        The frames, the kind of energy that the file declares, and the settings that it states.
    """
    file = SourceFile(path)
    return list(_examine(file, options, needs_energy, part)), file.energy_kind, file.calculation


class _SourceReader:
    """Reader of one file of a source.

    Args:
        source: the source.
        path: the file.
        options: keys, units and rules.
        needs_energy: drop frames without an energy.
        num_workers: number of processes that read a large file; None takes one per core.
    """

    def __init__(
        self,
        source: Source,
        path: Path,
        options: LabelOptions,
        needs_energy: bool,
        num_workers: int | None = 1,
    ) -> None:
        self._path, self._options, self._needs_energy = path, options, needs_energy
        self._source, self._num_workers = source, num_workers
        self._result = SourceResult(source, shown(path))
        self._origins: dict[Origins, Origins] = {}

    def read(self, records: IO[bytes], progress: Callable[[int], None] | None) -> SourceResult:
        """Read all frames; write the records of usable ones to `records`."""
        result = self._result
        offset = 0
        for number, (facts, fields) in enumerate(
            _with_systems(self._frames(progress), self._source.system), 1
        ):
            try:
                record = pack(fields | {"sid": facts.sid, "fid": facts.index}, "frame")
            except DataError as error:
                self._drop(facts.index, str(error).removeprefix("frame: ").rstrip("."))
                continue
            records.write(record)
            facts.offset, facts.size = offset, len(record)
            offset += len(record)
            result.frames.append(facts)
            if progress is not None and number % 50 == 0:
                progress(number)
        return result

    def _frames(self, progress: Callable[[int], None] | None) -> Iterator[tuple[FrameFacts, dict[str, Any]]]:
        """Read and label the frames; what cannot be used is noted in the result."""
        result = self._result
        try:
            file = SourceFile(self._path)
        except UnreadableError as error:
            self._drop(None, str(error))
            return
        except (DataError, OSError) as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._drop(None, text.removeprefix(str(self._path)).lstrip(": ").rstrip("."))
            return
        runs = RunFinder(file.format not in _COLLECTIONS)
        unreadable = 0
        for one in self._examined(file):
            if one.problem:
                unreadable += one.is_unreadable
                if unreadable > _MOST_BAD_FRAMES:
                    self._drop(None, f"more than {_MOST_BAD_FRAMES} frames cannot be read")
                    break
                self._drop(one.index, one.problem)
                if one.index is None:
                    break
            elif one.labelled is None or one.facts is None:
                result.not_selected += 1
            else:
                runs.add(one.facts, one.labelled.fields)
                one.facts.sid, one.facts.group = one.labelled.sid, one.labelled.group
                one.facts.origins = self._origins_of(one.labelled, file)
                yield one.facts, one.labelled.fields
        result.calculation, result.energy_kind = file.calculation, file.energy_kind

    def _examined(self, file: SourceFile) -> Iterator[_Examined]:
        """Examine the frames in order, those of a large file in several processes."""
        parts: list[FilePart] = []
        if self._num_workers != 1 and self._path.stat().st_size >= LARGE_SOURCE:
            try:
                parts = file.parts(_PART)
            except UnreadableError as error:
                yield _Examined(None, str(error))
                return
        if len(parts) < 2:
            yield from _examine(file, self._options, self._needs_energy)
            return
        examine = partial(
            _examine_part, path=self._path, options=self._options, needs_energy=self._needs_energy
        )
        with parallel_map(examine, parts, self._num_workers, most_waiting=_WAITING) as work:
            for part, (frames, energy_kind, calculation) in zip(parts, work, strict=False):
                file.energy_kind = energy_kind
                for index, settings in ((part.first, calculation.settings), *calculation.others):
                    file.calculation.note_settings(index, settings)
                yield from frames

    def _origins_of(self, found: Labelled, file: SourceFile) -> Origins:
        beside = file.constraints_from
        origin = f"constraints of {beside} beside the output" if beside else "constraints"
        tags = found.tags_from.replace("constraints", origin)
        fixed = found.fixed_from
        fixed = fixed if "none" in fixed else fixed.replace("constraints", origin)
        origins = Origins(tags, fixed, tuple(sorted(found.notices)))
        return self._origins.setdefault(origins, origins)

    def _drop(self, index: int | None, reason: str) -> None:
        self._result.dropped.append(Dropped(self._result.file, index, reason))


def _with_systems(
    frames: Iterator[tuple[FrameFacts, dict[str, Any]]], name: str
) -> Iterator[tuple[FrameFacts, dict[str, Any]]]:
    """Give a system to frames that state none.

    Frames of the same atoms in the same order are one system of their file: whether they are steps of one
    trajectory, with frames left out or others between them, nothing tells. Where the first two follow each
    other it has the name of the file, else the formula as its name, which it shares with such structures of
    other files.
    """
    names: dict[bytes, str] = {}

    def with_name(frame: tuple[FrameFacts, dict[str, Any]], is_trajectory: bool) -> None:
        facts = frame[0]
        if facts.sid:
            return
        if facts.atoms_digest not in names:
            of_file = name if not names else f"{name}#{len(names)}"
            of_atoms = f"{facts.formula}-{facts.atoms_digest[:3].hex()}"
            names[facts.atoms_digest] = of_file[-200:] if is_trajectory else of_atoms
        facts.sid = names[facts.atoms_digest]

    waiting: tuple[FrameFacts, dict[str, Any]] | None = None
    for facts, fields in frames:
        if waiting is not None:
            with_name(waiting, facts.run == waiting[0].run)
            yield waiting
        waiting = facts, fields
    if waiting is not None:
        with_name(waiting, False)
        yield waiting

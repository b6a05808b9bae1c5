"""Reading, labelling and packing of one source, in a process of its own."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from datasets_oc20.errors import DataError
from datasets_oc20.own_data.dft_settings import Calculation
from datasets_oc20.own_data.discovery import Source
from datasets_oc20.own_data.frame_facts import FrameFacts, RunFinder
from datasets_oc20.own_data.labels import Labelled, LabelOptions, label
from datasets_oc20.own_data.reading import LMDB, SourceFile, UnreadableError
from datasets_oc20.structure_record import pack
from datasets_oc20.untrusted import AnyPath

_COLLECTIONS = {"extxyz", "db", "json", LMDB}
"""Formats that hold any structures; others hold the steps of one calculation."""


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
        notices: number of frames by kind of notice.
        tags_from: number of frames by origin of their tags.
        fixed_from: number of frames by origin of their fixed atoms.
    """

    source: Source
    file: str
    frames: list[FrameFacts] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    calculation: Calculation = field(default_factory=Calculation)
    energy_kind: str | None = None
    not_selected: int = 0
    notices: Counter[str] = field(default_factory=Counter)
    tags_from: Counter[str] = field(default_factory=Counter)
    fixed_from: Counter[str] = field(default_factory=Counter)


def part_file(folder: AnyPath, source: Source) -> Path:
    """Path of the records of a source."""
    return Path(folder) / f"{source.number:08d}.part"


def read_source(
    source: Source,
    options: LabelOptions,
    folder: AnyPath,
    progress: Callable[[int], None] | None = None,
    needs_energy: bool = True,
) -> SourceResult:
    """Read a source and write the packed records of its usable frames to `part_file`.

    Where its first file is not whole and another file of the same calculation gives more, that one is taken.

    Args:
        source: the source.
        options: keys, units and rules.
        folder: folder of the parts.
        progress: called with the number of frames read so far.
        needs_energy: drop frames without an energy.
    """
    best: SourceResult | None = None
    path = part_file(folder, source)
    for file in source.paths:
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as records:
            result = _SourceReader(source, file, options, needs_energy).read(records, progress)
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


class _SourceReader:
    """Reader of one file of a source.

    Args:
        source: the source.
        path: the file.
        options: keys, units and rules.
        needs_energy: drop frames without an energy.
    """

    def __init__(self, source: Source, path: Path, options: LabelOptions, needs_energy: bool) -> None:
        self._path, self._options, self._needs_energy = path, options, needs_energy
        self._source = source
        self._result = SourceResult(source, str(path))

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
        try:
            with contextlib.closing(file.frames()) as frames:
                for frame in frames:
                    if frame.problem or frame.atoms is None:
                        self._drop(frame.index, frame.problem)
                        continue
                    try:
                        if self._options.select is not None and not self._options.select.matches(frame.atoms):
                            result.not_selected += 1
                            continue
                        found = label(frame.atoms, self._options, self._needs_energy)
                        facts = FrameFacts.of(frame.index, found.fields)
                    except DataError as error:
                        self._drop(frame.index, str(error).rstrip("."))
                        continue
                    runs.add(facts, found.fields)
                    facts.sid, facts.group = found.sid, found.group
                    self._count(found, file)
                    yield facts, found.fields
        except UnreadableError as error:
            self._drop(None, str(error))
        except OSError as error:
            self._drop(None, error.strerror or str(error))
        finally:
            result.calculation, result.energy_kind = file.calculation, file.energy_kind

    def _count(self, found: Labelled, file: SourceFile) -> None:
        self._result.notices.update(found.notices)
        beside = file.constraints_from
        origin = f"constraints of {beside} beside the output" if beside else "constraints"
        self._result.tags_from[found.tags_from.replace("constraints", origin)] += 1
        fixed = (
            found.fixed_from.replace("constraints", origin)
            if "none" not in found.fixed_from
            else found.fixed_from
        )
        self._result.fixed_from[fixed] += 1

    def _drop(self, index: int | None, reason: str) -> None:
        self._result.dropped.append(Dropped(str(self._path), index, reason))


def _with_systems(
    frames: Iterator[tuple[FrameFacts, dict[str, Any]]], name: str
) -> Iterator[tuple[FrameFacts, dict[str, Any]]]:
    """Give a system to frames that state none.

    A trajectory of several frames is a system, which has the name of its file; single structures of the same
    atoms in the same order are one system, which has their formula as its name.
    """
    waiting: tuple[FrameFacts, dict[str, Any]] | None = None
    run_goes_on = False
    for facts, fields in frames:
        if waiting is not None:
            continues = facts.run == waiting[0].run
            _name_system(waiting[0], name, run_goes_on or continues)
            yield waiting
            run_goes_on = continues
        waiting = facts, fields
    if waiting is not None:
        _name_system(waiting[0], name, run_goes_on)
        yield waiting


def _name_system(facts: FrameFacts, name: str, is_trajectory: bool) -> None:
    if facts.sid:
        return
    if is_trajectory:
        facts.sid = (name if not facts.run else f"{name}#{facts.run}")[-200:]
    else:
        facts.sid = f"{facts.formula}-{facts.atoms_digest[:3].hex()}"

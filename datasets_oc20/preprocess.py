"""Raw OC20 files to LMDB: references, OC20's filters, choice of frames."""

import logging
import os
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from datasets_oc20 import structure_record as records
from datasets_oc20.errors import DataError
from datasets_oc20.extxyz import RawFrame, read_frames
from datasets_oc20.frame_selection import informative_frames, split_later_frames, spread_frames
from datasets_oc20.periodicity import Periodicity
from datasets_oc20.raw_release import RawFile, list_raw_files, read_index
from datasets_oc20.untrusted import AnyPath
from datasets_oc20.workers import in_order
from datasets_oc20.writer import LmdbWriter

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessOptions:
    """What to keep of every system.

    Args:
        energy_kind: "adsorption" (energy less the system's reference) or "total".
        max_energy: drop frames whose adsorption energy is larger in size, eV; OC20's rule is 10. None: keep.
        max_force: drop frames with a larger force on a free atom, eV/Å; OC20's rule is 50. None: keep.
        min_force: drop frames whose largest force on a free atom is smaller, eV/Å: most frames of a
            relaxation are nearly at rest and teach little. None: keep.
        frames: at most so many frames of a relaxation, by `selection.informative_frames`. None: all.
        later_fraction: the last part of every relaxation goes to a file of its own.
        later_gap: the part beside it that goes to neither file.
        later_tail: the part behind it (and a gap) that is for training again.
        later_frames: at most so many evenly spread frames of a later part. None: all.
    """

    energy_kind: str = "adsorption"
    max_energy: float | None = 10.0
    max_force: float | None = 50.0
    min_force: float | None = None
    frames: int | None = None
    later_fraction: float = 0.0
    later_gap: float = 0.1
    later_tail: float = 0.0
    later_frames: int | None = None

    def __post_init__(self) -> None:
        if records.check_energy_kind(self.energy_kind) is None:
            raise DataError("energy_kind must be adsorption or total.")
        for name in ("max_energy", "max_force", "min_force", "frames", "later_frames"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DataError(f"{name} is {value}; it must be positive.")
        parts = (self.later_fraction, self.later_gap, self.later_tail)
        if not (min(parts) >= 0 and sum(parts) < 1):
            raise DataError(
                "later_fraction, later_gap and later_tail must not be negative, and below 1 together."
            )

    @property
    def chooses_frames(self) -> bool:
        """Whether frames are chosen by their place in the relaxation."""
        return self.frames is not None or self.later_fraction > 0

    def check_choice(
        self, source: AnyPath, files: list[RawFile], systems: Collection[str] | None, exclude: Collection[str]
    ) -> None:
        """Raise `DataError` when systems or frames are to be chosen from files that mix systems."""
        source = Path(source)
        chooses = self.chooses_frames or systems is not None or bool(exclude)
        if chooses and any(file.system is None for file in files):
            raise DataError(
                f"{source}: its files mix systems, so systems and frames cannot be chosen from it."
            )


@dataclass
class PreprocessReport:
    """Numbers of frames: `read` is the sum of the others; `files` is the number of raw files."""

    files: int = 0
    read: int = 0
    written: int = 0
    written_later: int = 0
    removed_energy: int = 0
    removed_force: int = 0
    removed_rest: int = 0
    not_chosen: int = 0

    def add(self, other: "PreprocessReport") -> None:
        """Add the counts of another report."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass
class FileResult:
    """The packed records of one raw file, with their numbers of atoms, and what is periodic in it."""

    report: PreprocessReport
    kept: list[tuple[bytes, int]] = field(default_factory=list)
    later: list[tuple[bytes, int]] = field(default_factory=list)
    periodicity: Periodicity = field(default_factory=Periodicity)


def preprocess(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PreprocessOptions | None = None,
    later_out: str | os.PathLike[str] | None = None,
    systems: Collection[str] | None = None,
    exclude: Collection[str] = (),
    num_workers: int | None = None,
) -> PreprocessReport:
    """Write the raw OC20 files of `folder` to the LMDB `out`, in parallel, with a progress bar.

    The order of the records, and so the file, does not depend on the number of workers. Nothing is written
    unless everything could be read.

    Args:
        folder: raw release (raw_release.py has the two layouts).
        out: LMDB to write.
        options: what to keep; OC20's own rules by default.
        later_out: LMDB for the later frames, when `options.later_fraction` is set.
        systems: only these systems.
        exclude: all but these systems.
        num_workers: processes; None takes one per core.

    Raises:
        DataError: a raw file is missing, damaged or incomplete (the message names file and frame), or both
            results have the same name.
        OSError: the disk is full.
    """
    options = options or PreprocessOptions()
    if (later_out is None) != (options.later_fraction == 0):
        raise DataError("a later fraction and a file for the later frames must be given together.")
    if later_out is not None and Path(later_out).resolve() == Path(out).resolve():
        raise DataError(f"{out}: is to hold the later frames too; name another file for them.")
    source = Path(folder)
    files = list_raw_files(source, options.energy_kind == "adsorption", systems, exclude)
    options.check_choice(source, files, systems, exclude)
    described = provenance(source, options)
    report, periodicity = PreprocessReport(), Periodicity()
    started = time.monotonic()
    with ExitStack() as stack:
        results = stack.enter_context(in_order(partial(read_raw_file, options=options), files, num_workers))
        writer = stack.enter_context(LmdbWriter(out, options.energy_kind, described))
        later = None
        if later_out is not None:
            later = stack.enter_context(LmdbWriter(later_out, options.energy_kind, described))
        for result in track(results, total=len(files), description=f"Reading {source.name}"):
            report.add(result.report)
            periodicity.merge(result.periodicity)
            for value, natoms in result.kept:
                writer.write_packed(value, natoms)
            if later is not None:
                for value, natoms in result.later:
                    later.write_packed(value, natoms)
    periodicity.say(source.name, _LOG)
    _LOG.info("%d frames read, %.0f frames/s", report.read, report.read / (time.monotonic() - started))
    return report


def provenance(source: AnyPath, options: PreprocessOptions) -> dict[str, Any]:
    """What the LMDB says of where its records come from."""
    source = Path(source)
    return {"source": source.resolve().name, "options": asdict(options)}


def read_raw_file(file: RawFile, options: PreprocessOptions) -> FileResult:
    """The records of one raw file that `options` keep; raises `DataError` naming file and frame."""
    frames = list(read_frames(file.path))
    labels = _labels(file, len(frames))
    result = FileResult(PreprocessReport(files=1, read=len(frames)))
    good: list[tuple[RawFrame, str, int, float]] = []
    for frame, (system, fid, reference) in zip(frames, labels, strict=True):
        result.periodicity.add(frame.cell, frame.pbc, f"{file.path.name}, frame {frame.index}")
        energy = frame.energy - (reference if options.energy_kind == "adsorption" else 0.0)
        if options.energy_kind == "adsorption" and _exceeds(energy, options.max_energy):
            result.report.removed_energy += 1
        elif _exceeds(frame.max_free_force, options.max_force):
            result.report.removed_force += 1
        elif options.min_force is not None and frame.max_free_force < options.min_force:
            result.report.removed_rest += 1
        else:
            good.append((frame, system, fid, energy))
    kept, later = _choose([frame for frame, *_ in good], options)
    result.kept = [_pack(*good[index], file.path) for index in kept]
    result.later = [_pack(*good[index], file.path) for index in later]
    result.report.written, result.report.written_later = len(result.kept), len(result.later)
    result.report.not_chosen = len(good) - len(result.kept) - len(result.later)
    return result


def _labels(file: RawFile, count: int) -> list[tuple[str, int, float]]:
    """(system, frame number, reference energy) of every frame of the file."""
    if file.index_file is None:
        return [(file.system or "", index, file.reference_energy or 0.0) for index in range(count)]
    labels = read_index(file.index_file)
    if len(labels) != count:
        raise DataError(
            f"{file.index_file}: {len(labels)} lines for the {count} frames of {file.path.name}; one of the "
            "two is incomplete."
        )
    return labels


def _exceeds(value: float, limit: float | None) -> bool:
    """False for NaN: a frame that is not a number is an error of `records.pack`, not filtered away."""
    return limit is not None and abs(value) > limit


def _choose(frames: list[RawFrame], options: PreprocessOptions) -> tuple[list[int], list[int]]:
    """Indices of the frames for the main file and for the later one."""
    if not frames:
        return [], []
    earlier, later = split_later_frames(
        len(frames), options.later_fraction, options.later_gap, options.later_tail
    )
    if options.frames is not None:
        forces = np.array([frames[index].max_free_force for index in earlier])
        earlier = earlier[informative_frames(forces, options.frames)]
    if options.later_frames is not None:
        later = later[spread_frames(len(later), options.later_frames)]
    return earlier.tolist(), later.tolist()


def _pack(frame: RawFrame, system: str, fid: int, energy: float, path: Path) -> tuple[bytes, int]:
    value = records.pack(
        {
            "pos": frame.pos,
            "atomic_numbers": frame.atomic_numbers,
            "cell": frame.cell,
            "pbc": frame.pbc,
            "tags": frame.tags,
            "fixed": frame.fixed,
            "forces": frame.forces,
            "energy": energy,
            "sid": system,
            "fid": fid,
        },
        f"{path}, frame {frame.index}",
    )
    return value, len(frame.atomic_numbers)

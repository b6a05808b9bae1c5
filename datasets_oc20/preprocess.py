"""Preprocessing of raw OC20 files to LMDB: reference energies, OC20's filters, choice of frames."""

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

from datasets_oc20.errors import DataError
from datasets_oc20.extxyz import RawFrame, read_frames
from datasets_oc20.frame_selection import informative_frames, split_later_frames, spread_frames
from datasets_oc20.periodicity import Periodicity
from datasets_oc20.raw_release import RawFile, list_raw_files
from datasets_oc20.structure_record import check_energy_kind, pack
from datasets_oc20.untrusted import AnyPath
from datasets_oc20.workers import parallel_map
from datasets_oc20.writer import LmdbWriter

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessOptions:
    """Filters and choice of frames.

    Attributes:
        energy_kind: "adsorption" (energy less the system's reference) or "total".
        max_energy: drop frames whose adsorption energy is larger in size, eV; OC20's rule is 10. None: keep.
        max_force: drop frames with a larger force on a free atom, eV/Å; OC20's rule is 50. None: keep.
        min_force: drop frames whose largest force on a free atom is smaller, eV/Å: most frames of a
            relaxation are nearly at rest and teach little. None: keep.
        frames: maximum number of frames of a relaxation, chosen by `informative_frames`. None: all.
        later_fraction: share of every relaxation, from its end, that goes to a file of its own.
        later_gap: share beside it that goes to neither file.
        later_tail: share behind it (and a gap) that is for training again.
        later_frames: maximum number of evenly spread frames of a later part. None: all.
        labels: statement about where the labels come from, such as "SevenNet-0, not DFT", for the files and
            the checkpoints that are trained on them. None: no statement.

    Raises:
        DataError: a value is out of range; it is named.
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
    labels: str | None = None

    def __post_init__(self) -> None:
        if check_energy_kind(self.energy_kind) is None:
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
        """True if frames are chosen by their place in the relaxation."""
        return self.frames is not None or self.later_fraction > 0

    def check_choice(
        self, source: AnyPath, files: list[RawFile], systems: Collection[str] | None, exclude: Collection[str]
    ) -> None:
        """Check that systems or frames are chosen only from files of one system each.

        Args:
            source: names the release in the error.
            files: files of the release.
            systems: the systems to keep; None for all.
            exclude: the systems to leave out.

        Raises:
            DataError: a file mixes systems.
        """
        chooses = self.chooses_frames or systems is not None or bool(exclude)
        if chooses and any(file.system is None for file in files):
            raise DataError(
                f"{source}: its files mix systems, so systems and frames cannot be chosen from it."
            )

    def choose_frames(self, frames: list[RawFrame]) -> tuple[list[int], list[int]]:
        """Choose frames of a relaxation by their place in it.

        Args:
            frames: those that pass the filters, in order.

        Returns:
            Indices of the frames for the main file and for the later one.
        """
        if not frames:
            return [], []
        earlier, later = split_later_frames(len(frames), self.later_fraction, self.later_gap, self.later_tail)
        if self.frames is not None:
            forces = np.array([frames[index].max_free_force for index in earlier])
            earlier = earlier[informative_frames(forces, self.frames)]
        if self.later_frames is not None:
            later = later[spread_frames(len(later), self.later_frames)]
        return earlier.tolist(), later.tolist()

    def provenance(self, source: AnyPath) -> dict[str, Any]:
        """Return the record of origin (name of the folder `source`, options) that an LMDB file keeps."""
        stated = {} if self.labels is None else {"labels": self.labels}
        return {"source": Path(source).resolve().name, "options": self.to_dict(), **stated}

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values; `labels` only where there is such a statement."""
        return {name: value for name, value in asdict(self).items() if name != "labels" or value is not None}


@dataclass
class PreprocessReport:
    """Numbers of raw files and frames.

    Attributes:
        files: raw files.
        read: frames; the sum of all numbers below.
        written: frames in the main file.
        written_later: frames in the file of later frames.
        removed_energy: frames with a larger energy than `max_energy`.
        removed_force: frames with a larger force than `max_force`.
        removed_rest: frames with a smaller force than `min_force`.
        not_chosen: frames that pass the filters and were not chosen.
    """

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
    """Packed records of one raw file.

    Attributes:
        report: numbers of frames.
        main: records of the main file, each with its number of atoms.
        later: records of the later file, likewise.
        periodicity: periodic directions of all frames.
    """

    report: PreprocessReport
    main: list[tuple[bytes, int]] = field(default_factory=list)
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
        options: filters and choice of frames; OC20's own rules by default.
        later_out: LMDB for the later frames, when `options.later_fraction` is set.
        systems: only these systems.
        exclude: all but these systems.
        num_workers: number of processes; None takes one per core.

    Returns:
        Numbers of files and frames.

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
    provenance = options.provenance(source)
    report, periodicity = PreprocessReport(), Periodicity()
    started = time.monotonic()
    with ExitStack() as stack:
        read = partial(read_raw_file, options=options)
        results = stack.enter_context(parallel_map(read, files, num_workers))
        writer = stack.enter_context(LmdbWriter(out, options.energy_kind, provenance))
        later = None
        if later_out is not None:
            later = stack.enter_context(LmdbWriter(later_out, options.energy_kind, provenance))
        for result in track(results, total=len(files), description=f"Reading {source.name}"):
            report.add(result.report)
            periodicity.merge(result.periodicity)
            for value, natoms in result.main:
                writer.write_packed(value, natoms)
            if later is not None:
                for value, natoms in result.later:
                    later.write_packed(value, natoms)
        if not report.written:
            raise DataError(
                f"{out}: no frame of {source} is left to write, of {report.read} that were read "
                f"({report.removed_energy} removed by energy, {report.removed_force} by force, "
                f"{report.removed_rest} nearly at rest, {report.written_later} for the later file): loosen "
                "the "
                "filters, or choose other systems."
            )
    periodicity.log(source.name, _LOG)
    _LOG.info("%d frames read, %.0f frames/s", report.read, report.read / (time.monotonic() - started))
    return report


def read_raw_file(file: RawFile, options: PreprocessOptions) -> FileResult:
    """Read one raw file, filter and choose its frames, and pack them.

    Args:
        file: the file and its labels.
        options: filters and choice of frames.

    Raises:
        DataError: the file or a frame is damaged; file and frame are named.
    """

    def exceeds(value: float, limit: float | None) -> bool:
        # False for NaN: a frame that is not a number is an error of `pack`, not filtered away.
        return limit is not None and abs(value) > limit

    frames = list(read_frames(file.path))
    labels = file.labels(len(frames))
    report = PreprocessReport(files=1, read=len(frames))
    result = FileResult(report)
    passed: list[tuple[RawFrame, str, int, float]] = []
    for frame, (system, fid, reference) in zip(frames, labels, strict=True):
        result.periodicity.add(frame.cell, frame.pbc, f"{file.path.name}, frame {frame.index}")
        energy = frame.energy - (reference if options.energy_kind == "adsorption" else 0.0)
        if options.energy_kind == "adsorption" and exceeds(energy, options.max_energy):
            report.removed_energy += 1
        elif exceeds(frame.max_free_force, options.max_force):
            report.removed_force += 1
        elif options.min_force is not None and frame.max_free_force < options.min_force:
            report.removed_rest += 1
        else:
            passed.append((frame, system, fid, energy))

    def packed(index: int) -> tuple[bytes, int]:
        frame, system, fid, energy = passed[index]
        fields = {**frame.arrays(), "energy": energy, "sid": system, "fid": fid}
        return pack(fields, f"{file.path}, frame {frame.index}"), len(frame.atomic_numbers)

    main, later = options.choose_frames([frame for frame, *_ in passed])
    result.main, result.later = [packed(index) for index in main], [packed(index) for index in later]
    report.written, report.written_later = len(main), len(later)
    report.not_chosen = len(passed) - len(main) - len(later)
    return result

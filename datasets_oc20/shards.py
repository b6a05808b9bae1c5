"""Preprocessing of large raw releases to a folder of LMDB shards, one process per shard, resumable.

The folder holds `plan.json` (source and options), `data.0000.lmdb` … and, beside each shard, `data.0000.json`
with its counts, written after it. A shard without counts is made again.
"""

import hashlib
import logging
import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from datasets_oc20.atomic import write_bytes
from datasets_oc20.errors import DataError
from datasets_oc20.lmdb_file import LmdbFile
from datasets_oc20.locking import exclusive
from datasets_oc20.periodicity import Periodicity
from datasets_oc20.preprocess import PreprocessOptions, PreprocessReport, read_raw_file
from datasets_oc20.raw_release import RawFile, list_raw_files
from datasets_oc20.untrusted import read_json
from datasets_oc20.workers import parallel_map
from datasets_oc20.writer import LmdbWriter

_LOG = logging.getLogger(__name__)
_MAX_SHARDS = 9999  # the names have four digits


@dataclass(frozen=True)
class _Shard:
    """One LMDB file to write.

    Attributes:
        path: the file.
        files: its raw files.
        options: filters and choice of frames.
        source: folder of the raw release.
        checksum: see `sum_of`; of the raw files when the run begins.
    """

    path: Path
    files: list[RawFile]
    options: PreprocessOptions
    source: Path
    checksum: str

    @property
    def counts(self) -> Path:
        """File of the counts."""
        return self.path.with_suffix(".json")

    @staticmethod
    def sum_of(files: list[RawFile], options: PreprocessOptions) -> str:
        """Return a sum that changes with the options, and size, time or reference energy of a raw file."""

        def state(path: Path | None) -> list[int] | None:
            return None if path is None else [(status := path.stat()).st_size, status.st_mtime_ns]

        sizes = [
            [file.path.name, state(file.path), state(file.index_file), file.reference_energy]
            for file in files
        ]
        return hashlib.sha256(orjson.dumps([sizes, options.to_dict()])).hexdigest()

    def finished_report(self) -> PreprocessReport | None:
        """Return the counts if the shard is there, whole, and made of the same raw files."""
        if not self.counts.exists():
            return None
        counts = _read_object(self.counts)
        if counts.get("checksum") != self.checksum:
            return None
        report = PreprocessReport(**counts["report"])
        if report.written:
            try:
                LmdbFile(self.path).close()
            except DataError:
                return None
        return report

    def write(self) -> tuple[str, PreprocessReport, float]:
        """Write the shard and its counts; return its name, the counts, and the seconds it took."""
        started = time.monotonic()
        report, periodicity = PreprocessReport(), Periodicity()
        writer = LmdbWriter(self.path, self.options.energy_kind, self.options.provenance(self.source))
        try:
            for file in self.files:
                result = read_raw_file(file, self.options)
                report.add(result.report)
                periodicity.merge(result.periodicity)
                for value, natoms in result.main:
                    writer.write_packed(value, natoms)
        except BaseException:
            writer.abort()
            raise
        periodicity.log(self.path.name)
        if report.written:
            writer.close()
        else:  # the filters left nothing, which only matters when it is so for all shards
            writer.abort()
        seconds = time.monotonic() - started
        counts = {"checksum": self.checksum, "seconds": round(seconds, 3), "report": asdict(report)}
        write_bytes(self.counts, orjson.dumps(counts, option=orjson.OPT_INDENT_2))
        return self.path.name, report, seconds


def preprocess_shards(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    shards: int,
    options: PreprocessOptions | None = None,
    systems: Collection[str] | None = None,
    exclude: Collection[str] = (),
    num_workers: int | None = None,
) -> PreprocessReport:
    """Write the raw OC20 files of `folder` to at most `shards` LMDB files in the folder `out`.

    Writes are atomic. After a run was stopped or killed, the same call makes the missing shards; one whose
    raw files have changed is made again. The files do not depend on the number of workers.

    Args:
        folder: raw release (raw_release.py has the two layouts).
        out: folder for the shards; made when missing.
        shards: maximum number of files; there are no more of them than raw files.
        options: filters and choice of frames; OC20's own rules by default.
        systems: only these systems.
        exclude: all but these systems.
        num_workers: number of processes; None takes one per core.

    Returns:
        Numbers of files and frames, those of earlier runs included.

    Raises:
        DataError: a raw file is wrong, `out` holds something else, or another process is writing to it.
        OSError: the disk is full, or a worker was killed.
    """
    options = options or PreprocessOptions()
    if not 1 <= shards <= _MAX_SHARDS:
        raise DataError(f"shards is {shards}; it must be from 1 to {_MAX_SHARDS}.")
    if options.later_fraction > 0:
        raise DataError("later frames go to one file: leave the shards away.")
    source, target = Path(folder), Path(out)
    files = list_raw_files(source, options.energy_kind == "adsorption", systems, exclude)
    options.check_choice(source, files, systems, exclude)
    target.mkdir(parents=True, exist_ok=True)
    with exclusive(target / ".lock", target):
        _settle_plan(target, source, files, options, shards)
        # Neighbouring files go together, in nearly equal numbers.
        ends = np.linspace(0, len(files), min(shards, len(files)) + 1).round().astype(int)
        planned = []
        for number, (start, end) in enumerate(pairwise(ends)):
            part, path = files[start:end], target / f"data.{number:04d}.lmdb"
            planned.append(_Shard(path, part, options, source, _Shard.sum_of(part, options)))
        _remove_unfinished(target)
        report, missing = PreprocessReport(), []
        for shard in planned:
            finished = shard.finished_report()
            missing += [shard] if finished is None else []
            report.add(finished or PreprocessReport())
        if len(missing) < len(planned):
            _LOG.info("%d of %d shards are there already", len(planned) - len(missing), len(planned))
        report.add(_write_shards(missing, num_workers))
    if report.written == 0:
        raise DataError(f"{target}: no frame of {source} passes the filters.")
    return report


def _settle_plan(
    target: Path, source: Path, files: list[RawFile], options: PreprocessOptions, shards: int
) -> None:
    """Write the plan, or raise `DataError` when the folder was begun with another one."""
    names = [file.path.name for file in files]
    plan = {
        "source": source.resolve().name,
        "options": options.to_dict(),
        "shards": shards,
        "raw_files": len(names),
        "raw_file_names": hashlib.sha256(orjson.dumps(names)).hexdigest(),
    }
    path = target / "plan.json"
    if not path.exists():
        other = next(iter(sorted(target.glob("*.lmdb"))), None)
        if other is not None:
            raise DataError(f"{other}: was not made by this command; name a new folder.")
        write_bytes(path, orjson.dumps(plan, option=orjson.OPT_INDENT_2))
    known = _read_object(path)
    different = [name for name, value in plan.items() if known.get(name) != value]
    if different:
        raise DataError(
            f"{path}: the folder was begun with other {different[0].replace('_', ' ')}; name a new folder, "
            "or give the options and files of before."
        )


def _remove_unfinished(target: Path) -> None:
    """Remove temporary files of killed workers; the lock ensures that none is at work."""
    number = "[0-9]" * 4
    for name in ("plan.json", f"data.{number}.lmdb", f"data.{number}.json"):
        for path in target.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def _write_shards(shards: list[_Shard], num_workers: int | None) -> PreprocessReport:
    """Write the shards in parallel, and log the speed and the time left."""

    def duration(seconds: float) -> str:
        return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"

    total = PreprocessReport()
    started = time.monotonic()
    with parallel_map(_Shard.write, shards, num_workers, in_order=False) as results:
        for count, (name, report, seconds) in enumerate(results, start=1):
            total.add(report)
            elapsed = time.monotonic() - started
            _LOG.info(
                "%s: %d of %d frames, %.0f frames/s; together %.0f frames/s, %d shards and about %s to go",
                name,
                report.written,
                report.read,
                report.read / seconds,
                total.read / elapsed,
                len(shards) - count,
                duration(elapsed / count * (len(shards) - count)),
            )
    return total


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that this command wrote."""
    try:
        value = read_json(path)
    except DataError as error:
        raise DataError(f"{path}: is not readable; remove it and run again.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: was not made by this command; name a new folder.")
    return value

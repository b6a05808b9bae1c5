"""Large raw releases to a folder of LMDB shards: one process per shard, and a run that stops can go on.

The folder holds `plan.json` (what was asked for), `data.0000.lmdb` … and, beside each shard, `data.0000.json`
with its counts, written after it. A shard without counts is made again.
"""

import hashlib
import logging
import os
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from datasets_oc20.atomic import write_bytes
from datasets_oc20.errors import DataError
from datasets_oc20.lmdb_file import check_lmdb_file
from datasets_oc20.locking import exclusive
from datasets_oc20.periodicity import Periodicity
from datasets_oc20.preprocess import PreprocessOptions, PreprocessReport, provenance, read_raw_file
from datasets_oc20.raw_release import RawFile, list_raw_files
from datasets_oc20.untrusted import read_json
from datasets_oc20.workers import as_they_finish
from datasets_oc20.writer import LmdbWriter

_LOG = logging.getLogger(__name__)
_MOST_SHARDS = 9999  # the names have four digits


@dataclass(frozen=True)
class _Shard:
    """One file to write, from which raw files; `checksum` says whether one that is there is of the same."""

    path: Path
    files: list[RawFile]
    options: PreprocessOptions
    source: Path
    checksum: str

    @property
    def counts(self) -> Path:
        return self.path.with_suffix(".json")


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

    Every shard appears whole or not at all. When the run was stopped or killed, the same call goes on with
    the shards that are missing; one whose raw files have changed is made again. The files do not depend on
    the number of workers.

    Args:
        folder: raw release (raw_release.py has the two layouts).
        out: folder for the shards; made when missing.
        shards: number of files; no more than there are raw files are made.
        options: what to keep; OC20's own rules by default.
        systems: only these systems.
        exclude: all but these systems.
        num_workers: processes; None takes one per core.

    Raises:
        DataError: a raw file is wrong, `out` holds something else, or another process is writing to it.
        OSError: the disk is full, or a worker was killed.
    """
    options = options or PreprocessOptions()
    if not 1 <= shards <= _MOST_SHARDS:
        raise DataError(f"shards is {shards}; it must be from 1 to {_MOST_SHARDS}.")
    if options.later_fraction > 0:
        raise DataError("later frames go to one file: leave the shards away.")
    source, target = Path(folder), Path(out)
    files = list_raw_files(source, options.energy_kind == "adsorption", systems, exclude)
    options.check_choice(source, files, systems, exclude)
    target.mkdir(parents=True, exist_ok=True)
    with exclusive(target / ".lock", target):
        _settle_plan(target, source, files, options, shards)
        planned = [
            _Shard(target / f"data.{number:04d}.lmdb", part, options, source, _checksum(part, options))
            for number, part in enumerate(_split(files, shards))
        ]
        _remove_unfinished(target)
        report, missing = PreprocessReport(), []
        for shard in planned:
            done = _finished(shard)
            missing += [shard] if done is None else []
            report.add(done or PreprocessReport())
        if len(missing) < len(planned):
            _LOG.info("%d of %d shards are there already", len(planned) - len(missing), len(planned))
        report.add(_write(missing, num_workers))
    if report.written == 0:
        raise DataError(f"{target}: no frame of {source} passes the filters.")
    return report


def _settle_plan(
    target: Path, source: Path, files: list[RawFile], options: PreprocessOptions, shards: int
) -> None:
    """Write what is to be done, or raise `DataError` when the folder was begun for something else."""
    names = [file.path.name for file in files]
    asked = {
        "source": source.resolve().name,
        "options": asdict(options),
        "shards": shards,
        "raw_files": len(names),
        "raw_file_names": hashlib.sha256(orjson.dumps(names)).hexdigest(),
    }
    path = target / "plan.json"
    if not path.exists():
        stranger = next(iter(sorted(target.glob("*.lmdb"))), None)
        if stranger is not None:
            raise DataError(f"{stranger}: was not made by this command; name a new folder.")
        write_bytes(path, orjson.dumps(asked, option=orjson.OPT_INDENT_2))
    known = _read_json(path)
    different = [name for name, value in asked.items() if known.get(name) != value]
    if different:
        raise DataError(
            f"{path}: the folder was begun with other {different[0].replace('_', ' ')}; name a new folder, "
            "or give the options and files of before."
        )


def _checksum(files: list[RawFile], options: PreprocessOptions) -> str:
    """Changes when a raw file of a shard was replaced (its size says so) or its reference energy changed."""
    sizes = [
        [
            file.path.name,
            file.path.stat().st_size,
            file.index_file.stat().st_size if file.index_file else None,
            file.reference_energy,
        ]
        for file in files
    ]
    return hashlib.sha256(orjson.dumps([sizes, asdict(options)])).hexdigest()


def _split(files: list[RawFile], shards: int) -> list[list[RawFile]]:
    """Neighbouring files together, in nearly equal numbers."""
    ends = np.linspace(0, len(files), min(shards, len(files)) + 1).round().astype(int)
    return [files[start:end] for start, end in pairwise(ends)]


def _remove_unfinished(target: Path) -> None:
    """Remove what killed workers left; the lock says that none is at work."""
    number = "[0-9]" * 4
    for name in ("plan.json", f"data.{number}.lmdb", f"data.{number}.json"):
        for path in target.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def _finished(shard: _Shard) -> PreprocessReport | None:
    """The counts of a shard that is there, whole, and made of the same raw files."""
    if not shard.counts.exists():
        return None
    counts = _read_json(shard.counts)
    if counts.get("checksum") != shard.checksum:
        return None
    report = PreprocessReport(**counts["report"])
    if report.written:
        try:
            check_lmdb_file(shard.path)
        except DataError:
            return None
    return report


def _write(shards: list[_Shard], num_workers: int | None) -> PreprocessReport:
    """Make the shards, and say how fast."""
    report = PreprocessReport()
    started = time.monotonic()
    with ExitStack() as stack:
        results = stack.enter_context(as_they_finish(_write_shard, shards, num_workers)) if shards else ()
        for count, (name, one, seconds) in enumerate(results, start=1):
            report.add(one)
            elapsed = time.monotonic() - started
            _LOG.info(
                "%s: %d of %d frames, %.0f frames/s; together %.0f frames/s, %d shards and about %s to go",
                name,
                one.written,
                one.read,
                one.read / seconds,
                report.read / elapsed,
                len(shards) - count,
                _duration(elapsed / count * (len(shards) - count)),
            )
    return report


def _write_shard(shard: _Shard) -> tuple[str, PreprocessReport, float]:
    """In a worker: the name of the shard, its counts, and the seconds it took."""
    started = time.monotonic()
    report, periodicity = PreprocessReport(), Periodicity()
    writer = LmdbWriter(shard.path, shard.options.energy_kind, provenance(shard.source, shard.options))
    try:
        for file in shard.files:
            result = read_raw_file(file, shard.options)
            report.add(result.report)
            periodicity.merge(result.periodicity)
            for value, natoms in result.kept:
                writer.write_packed(value, natoms)
    except BaseException:
        writer.abort()
        raise
    periodicity.say(shard.path.name)
    if report.written:
        writer.close()
    else:  # the filters left nothing, which only matters when it is so for all shards
        writer.abort()
    seconds = time.monotonic() - started
    counts = {"checksum": shard.checksum, "seconds": round(seconds, 3), "report": asdict(report)}
    write_bytes(shard.counts, orjson.dumps(counts, option=orjson.OPT_INDENT_2))
    return shard.path.name, report, seconds


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except DataError as error:
        raise DataError(f"{path}: is not readable; remove it and run again.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: was not made by this command; name a new folder.")
    return value


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"

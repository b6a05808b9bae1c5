"""Conversion of OC20's and our LMDB files to ASE-LMDB and back."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from datasets_oc20.ase_lmdb import open_shard
from datasets_oc20.ase_lmdb_writer import AseLmdbWriter
from datasets_oc20.errors import DataError
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.workers import parallel_map
from datasets_oc20.writer import LmdbWriter

_LOG = logging.getLogger(__name__)
WRITERS: dict[str, type[AseLmdbWriter] | type[LmdbWriter]] = {"ase": AseLmdbWriter, "oc20": LmdbWriter}
SUFFIXES = {"ase": ".aselmdb", "oc20": ".lmdb"}


@dataclass(frozen=True)
class _Conversion:
    """Conversion of one file, done by one worker."""

    source: Path
    target: Path
    to: str
    energy_kind: str | None
    overwrite: bool

    def run(self) -> tuple[str, int, bool]:
        """Write the target unless it exists; return its name, number of records, and whether it is new."""
        dataset = OC20Lmdb(self.source, self.energy_kind)
        if self.target.exists() and not self.overwrite:
            existing = len(OC20Lmdb(self.target, self.energy_kind))
            if existing != len(dataset):
                raise DataError(
                    f"{self.target}: is there already with {existing} records instead of {len(dataset)}; "
                    "move it away."
                )
            return self.target.name, existing, False
        metadata = orjson.loads(open_shard(self.source).get(b"metadata") or b"{}")
        provenance = metadata.get("provenance", {"source": self.source.name})
        with WRITERS[self.to](self.target, dataset.energy_kind, provenance) as writer:
            for index in range(len(dataset)):
                writer.write(dataset[index])
        return self.target.name, len(dataset), True


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    energy_kind: str | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write the records of `source` in the other format, without loss.

    All that the data object holds is kept bit by bit: positions, cell, targets, tags, fixed atoms, ids, kind
    of energy. Edges, which only OC20's own files hold, are dropped, as in reading.

    Args:
        source: an LMDB or ASE-LMDB file, or a folder of them.
        out: the file to write, or a folder when `source` is one: every shard keeps its name but for the
            suffix. Files that are there with as many records are kept, so a stopped run goes on.
        to: "ase" or "oc20".
        energy_kind: "adsorption" or "total", where the source does not declare it.
        num_workers: number of processes, one shard each; None takes one per core.
        overwrite: replace files that are there; never those of `source`.

    Returns:
        The number of records in the converted files.

    Raises:
        DataError: `source` is wrong, its kind of energy not known, or `out` is there and something else.
        OSError: the disk is full.
    """
    if to not in WRITERS:
        raise DataError(f"the format is {to!r}; it must be one of {', '.join(WRITERS)}.")
    dataset = OC20Lmdb(source, energy_kind)
    if dataset.energy_kind is None and "energy" in dataset[0]:
        raise DataError(f"{source}: does not say which energies it holds; declare adsorption or total.")
    target = Path(out)
    if Path(source).is_dir():
        if target.resolve() == Path(source).resolve():
            raise DataError(f"{target}: is the source; name another folder for the result.")
        target.mkdir(parents=True, exist_ok=True)
        targets = shard_targets(dataset.shards, target, to)
    else:
        targets = [target]
    for path in targets:  # under another name or behind a link, too
        if path.exists() and any(path.samefile(shard) for shard in dataset.shards):
            raise DataError(f"{path}: is the source; name another file for the result.")
    conversions = [
        _Conversion(shard, path, to, energy_kind, overwrite)
        for shard, path in zip(dataset.shards, targets, strict=True)
    ]
    total, started = 0, time.monotonic()
    with parallel_map(_Conversion.run, conversions, num_workers, in_order=False) as results:
        for count, (name, records, is_new) in enumerate(results, start=1):
            total += records
            rate = total / (time.monotonic() - started)
            outcome = f"{records} records, {rate:.0f} records/s" if is_new else "is there already"
            _LOG.info("%s: %s (%d of %d files)", name, outcome, count, len(conversions))
    return total


def shard_targets(shards: Sequence[Path], folder: str | os.PathLike[str], to: str) -> list[Path]:
    """List the files in `folder` that converted `shards` are written to.

    Args:
        shards: the files to convert.
        folder: folder of the converted files.
        to: "ase" or "oc20".
    """
    return [Path(folder) / (shard.stem + SUFFIXES[to]) for shard in shards]

"""Reading of structures for calibration and held-out tests, from LMDB files or others that ASE reads."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch_geometric.data import Data

from datasets_oc20 import open_dataset, structure_record
from datasets_oc20.errors import DataError
from datasets_oc20.extxyz import read_frames
from datasets_oc20.untrusted import AnyPath, open_compressed
from equiformer2.errors import InputError

_DRAWN_PER_STRUCTURE = 16
"""Random records read per structure, to find enough systems in a dataset of millions."""
_MOST_HEAD = 4 << 30
_RAW_ENDINGS = (".extxyz", ".extxyz.xz")


def read_structures(
    paths: str | Path | Sequence[str | Path], limit: int | None = None, seed: int = 0
) -> list[Data]:
    """Read structures, spread over as many systems as possible.

    Raw frames get the name of their file as `sid` and their forces, but no energy: they store a total energy,
    which says nothing about a model of adsorption energies.

    Args:
        paths: LMDB files, folders of LMDB shards, OC20's extended XYZ files (`.extxyz`, `.extxyz.xz`), other
            files that ASE reads, or folders of those.
        limit: maximum number of structures; None for all of them.
        seed: random seed of the choice of frames, and of systems when there are more than `limit`.

    Returns:
        Structures in stored order.

    Raises:
        InputError: `limit` is not positive, or nothing is named.
        datasets_oc20.DataError: a file is missing or damaged; it is named.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{limit} structures were asked for: give at least 1")
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    if not named:
        raise InputError("no data are named: give LMDB files, folders of shards or files that ASE reads")
    rng = np.random.default_rng(seed)
    structures: list[Data] = []
    for path in map(Path, named):
        structures += _read_frames(path) if raw_files(path) else _read_dataset(path, limit, rng)
    if limit is None or limit >= len(structures):
        return structures
    # One random frame of every system in turn until there are `limit`; in stored order.
    by_system: dict[str, list[int]] = {}
    for position in rng.permutation(len(structures)).tolist():
        by_system.setdefault(structures[position].sid, []).append(position)
    ranked = [(turn, p) for frames in by_system.values() for turn, p in enumerate(frames)]
    chosen = [position for _, position in sorted(ranked, key=lambda item: item[0])[:limit]]
    return [structures[position] for position in sorted(chosen)]


def mixed_systems(structures: Sequence[Data], seed: int = 0) -> list[Data]:
    """Arrange structures so that the first ones, however many, represent all of them.

    Stored order puts relatives side by side: frames of one system, slabs of one bulk.

    Args:
        structures: structures in any order.
        seed: random seed.

    Returns:
        One structure of every system in turn, systems and their frames in random order.
    """
    rng = np.random.default_rng(seed)
    turns: dict[str, int] = {}
    ranked: list[tuple[int, int, int]] = []
    for position in rng.permutation(len(structures)).tolist():
        sid = structures[position].sid
        turns[sid] = turns.get(sid, -1) + 1
        ranked.append((turns[sid], len(ranked), position))
    return [structures[position] for _, _, position in sorted(ranked)]


def labelled_energies(
    paths: str | Path | Sequence[str | Path], energy_kind: str, declared: str | None = None
) -> bool:
    """Return True if stored energies are of the model's kind, so that they can be its labels.

    Args:
        paths: files, as in `read_structures`.
        energy_kind: kind of energy of the model.
        declared: kind of energy of files that do not state theirs.

    Raises:
        datasets_oc20.DataError: a file is missing or damaged.
    """
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    return all(
        not raw_files(Path(path)) and open_dataset(path, declared).energy_kind == energy_kind
        for path in named
    )


def raw_files(path: AnyPath) -> list[Path]:
    """List OC20's raw extended XYZ files that `path` names or, as a folder, holds; none for anything else.

    The first file tells: its frames have the columns `move_mask` and `tags`.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.name.endswith(_RAW_ENDINGS))
    else:
        files = [path] if path.name.endswith(_RAW_ENDINGS) else []
    return files if files and _is_raw(files[0]) else []


def _is_raw(file: Path) -> bool:
    """Tell whether the first frame of a file has OC20's columns; True for one that the reader will refuse."""
    try:
        with open_compressed(file, _MOST_HEAD) as content:
            content.readline(_MOST_HEAD // 2)
            columns = content.readline(_MOST_HEAD // 2)
    except (DataError, OSError):
        return True
    return b":move_mask:" in columns and b":tags:" in columns


def _read_frames(path: Path) -> list[Data]:
    structures = []
    for file in raw_files(path):
        sid = file.name.removesuffix(".xz").removesuffix(".extxyz")
        for frame in read_frames(file):
            fields: dict[str, Any] = {
                **asdict(frame),
                "cell": frame.cell.reshape(1, 3, 3),
                "pbc": frame.pbc.reshape(1, 3),
                "sid": sid,
                "fid": frame.index,
            }
            del fields["energy"], fields["index"]
            structures.append(structure_record.make_data(fields, f"{file}, frame {frame.index}"))
    return structures


def _read_dataset(path: Path, limit: int | None, rng: np.random.Generator) -> list[Data]:
    dataset = open_dataset(path, needs_energy=False)
    indices = np.arange(len(dataset))
    if limit is not None and limit * _DRAWN_PER_STRUCTURE < len(dataset):
        indices = np.sort(rng.choice(len(dataset), limit * _DRAWN_PER_STRUCTURE, replace=False))
    structures = [dataset[int(index)] for index in indices]
    for index, data in zip(indices.tolist(), structures, strict=True):
        if not data.sid:  # of an unknown system: counts as one of its own
            data.sid = dataset.describe(index)
    return structures

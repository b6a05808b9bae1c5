"""Ten tasks for a mixture of experts: two kinds of labels, five groups of elements that share elements.

A system belongs to the first group of which its slab (all atoms but the adsorbate) holds an element. The
groups share elements: copper, for example, is in slabs of all of them but the last. Within a task, held-out
slabs have other combinations of elements than those that are learned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from tqdm import tqdm

from datasets_oc20 import LmdbWriter, OC20Lmdb
from datasets_oc20.frame_selection import hold_out_systems, spread_frames
from datasets_oc20.preprocess import preprocess
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json

KINDS = ("dft", "teacher")
#: Group -> elements, one of which is in the slab; the first group that fits is taken.
GROUPS: Mapping[str, frozenset[str]] = {
    "chalcogens": frozenset({"S", "Se", "Te"}),
    "pnictogens": frozenset({"N", "P", "As", "Sb", "Bi"}),
    "tetrels": frozenset({"B", "Al", "Ga", "In", "Tl", "C", "Si", "Ge", "Sn", "Pb"}),
    "coinage": frozenset({"Cu", "Ag", "Au"}),
    "others": frozenset(),
}
TASKS = tuple(f"{kind}-{group}" for kind in KINDS for group in GROUPS)
_ADSORBATE = 2
_HELD_OUT = 4
"""One of so many combinations of elements is held out, and at least one."""


@dataclass(frozen=True)
class Sources:
    """Folders of raw frames, and how many frames are taken of each task.

    Attributes:
        dft, teacher: folders.
        frames: most frames of a task to learn.
        test_frames: most frames of a task to judge by.
        tasks: names of those that are used.
    """

    dft: Path
    teacher: Path
    frames: int
    test_frames: int
    tasks: tuple[str, ...] = TASKS

    def about(self) -> dict[str, Any]:
        """Return plain values, by which other data are told apart."""
        values = {**vars(self), "tasks": list(self.tasks)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def kind_of(task: str) -> str:
    """Name the kind of labels of a task."""
    return task.partition("-")[0]


def group_of(elements: frozenset[str]) -> str:
    """Name the group of a slab with these elements."""
    return next(name for name, own in GROUPS.items() if not own or own & elements)


def prepare(folder: Path, sources: Sources) -> None:
    """Write the files of all tasks, unless they are there.

    Args:
        folder: gets `TASK.train.lmdb`, `TASK.test.lmdb` and, last, `tasks.json`.
        sources: of the frames.

    Raises:
        InputError: files of other sources are there, or a task has too few systems.
    """
    listing = folder / "tasks.json"
    if listing.exists():
        if read_json(listing)["sources"] != sources.about():
            raise InputError(f"{listing} is of other data or numbers of frames: give another --runs")
        return
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {}
    for kind, source in (("dft", sources.dft), ("teacher", sources.teacher)):
        if not any(kind_of(task) == kind for task in sources.tasks):
            continue
        whole = folder / f"{kind}.whole.lmdb"
        whole.unlink(missing_ok=True)
        preprocess(source, whole)
        tasks |= dict(_divide(OC20Lmdb(whole), kind, folder, sources))
        whole.unlink()
    write_json(listing, {"sources": sources.about(), "tasks": tasks})


def _divide(
    dataset: OC20Lmdb, kind: str, folder: Path, sources: Sources
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write the files of one kind of labels, and describe its tasks."""
    rows: dict[str, dict[str, list[int]]] = {group: {} for group in GROUPS}
    for row in tqdm(range(len(dataset)), desc=f"{kind} frames", unit="frame"):
        data = dataset[row]
        slab = data.atomic_numbers[data.tags != _ADSORBATE].unique().tolist()
        elements = frozenset(chemical_symbols[number] for number in slab)
        rows[group_of(elements)].setdefault("-".join(sorted(elements)), []).append(row)
    for group, combinations in rows.items():
        if f"{kind}-{group}" not in sources.tasks:
            continue
        if len(combinations) < 2:
            raise InputError(
                f"{kind} data have {len(combinations)} slabs of the group {group}: to learn one and judge "
                "by another, give at least 2"
            )
        names = sorted(combinations)
        training, held = hold_out_systems(names, max(1, len(names) // _HELD_OUT))
        counts = {}
        for part, chosen, most in (
            ("train", training, sources.frames),
            ("test", held, sources.test_frames),
        ):
            own = np.array(sorted(row for name in chosen for row in combinations[name]))
            taken = own[spread_frames(len(own), most)]
            counts[part] = _write(dataset, taken, task_file(folder, f"{kind}-{group}", part))
        yield f"{kind}-{group}", {"slabs": {"train": training, "test": held}, "frames": counts}


def task_file(folder: Path, task: str, part: str) -> Path:
    """Path of the frames of a task to learn (`train`) or to judge by (`test`)."""
    return folder / f"{task}.{part}.lmdb"


def _write(dataset: OC20Lmdb, rows: Sequence[int] | np.ndarray, path: Path) -> int:
    path.unlink(missing_ok=True)
    with LmdbWriter(path, dataset.energy_kind) as writer:
        for row in rows:
            writer.write(dataset[int(row)])
    return len(rows)

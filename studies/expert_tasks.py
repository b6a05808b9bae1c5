"""Ten tasks for a mixture of experts: two kinds of labels, five groups of elements that share elements.

A system belongs to the first group of which its slab (all atoms but the adsorbate) holds an element. The
groups share elements: copper, for example, is in slabs of all of them but the last. Within a task, held-out
slabs are new combinations of elements that other slabs of the task have. Where every slab has an element of
its own, as in some groups of DFT frames, later frames of the relaxations are held out.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from tqdm import tqdm

from datasets_oc20 import LmdbWriter, OC20Lmdb
from datasets_oc20.frame_selection import split_later_frames, spread_frames
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
"""One of so many slabs is held out, and at least one."""
_LATER = 0.25
"""Share of the frames of a relaxation that is held out where no slab can be."""


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
    tasks: dict[str, Any] = {}
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
    rows: dict[str, dict[str, dict[str, list[int]]]] = {group: {} for group in GROUPS}
    for row in tqdm(range(len(dataset)), desc=f"{kind} frames", unit="frame"):
        data = dataset[row]
        numbers = data.atomic_numbers[data.tags != _ADSORBATE].unique().tolist()
        elements = frozenset(chemical_symbols[number] for number in numbers)
        systems_of_slab = rows[group_of(elements)].setdefault("-".join(sorted(elements)), {})
        systems_of_slab.setdefault(str(data.sid), []).append(row)
    for group, slabs in rows.items():
        if f"{kind}-{group}" not in sources.tasks:
            continue
        if not slabs:
            raise InputError(f"{kind} data have no slab of the group {group}: leave the task out (--tasks)")
        held = choose_held_out(sorted(slabs))
        parts: dict[str, list[int]] = {"train": [], "test": []}
        for slab, systems in slabs.items():
            for own in systems.values():
                if held:
                    parts["test" if slab in held else "train"] += own
                    continue
                early, late = split_later_frames(len(own), _LATER)
                parts["train"] += [own[index] for index in early]
                parts["test"] += [own[index] for index in late]
        counts = {}
        for part, most in (("train", sources.frames), ("test", sources.test_frames)):
            chosen = np.array(sorted(parts[part]))
            taken = chosen[spread_frames(len(chosen), most)]
            counts[part] = _write(dataset, taken, task_file(folder, f"{kind}-{group}", part))
        told = {"slabs": sorted(slabs), "held_out_slabs": held, "frames": counts}
        yield f"{kind}-{group}", told


def choose_held_out(slabs: Sequence[str]) -> list[str]:
    """Choose slabs to judge by, all of whose elements are in slabs that are left to learn.

    Args:
        slabs: elements of each, joined by `-`.

    Returns:
        At most a quarter of them, and one where that is none; empty where every slab has an element of its
        own, so that later frames have to be held out.
    """
    order = sorted(slabs)
    random.Random(0).shuffle(order)
    held: list[str] = []
    for slab in order:
        left = {element for other in slabs if other not in (*held, slab) for element in other.split("-")}
        if set(slab.split("-")) <= left:
            held.append(slab)
        if len(held) >= max(1, len(slabs) // _HELD_OUT):
            break
    return sorted(held)


def task_file(folder: Path, task: str, part: str) -> Path:
    """Path of the frames of a task to learn (`train`) or to judge by (`test`)."""
    return folder / f"{task}.{part}.lmdb"


def _write(dataset: OC20Lmdb, rows: Sequence[int] | np.ndarray, path: Path) -> int:
    path.unlink(missing_ok=True)
    with LmdbWriter(path, dataset.energy_kind) as writer:
        for row in rows:
            writer.write(dataset[int(row)])
    return len(rows)

"""What is in a dataset, and which of its frames look wrong: the first thing to run on data of one's own."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b

import numpy as np
from ase.geometry import complete_cell
from torch_geometric.data import Data

from datasets_oc20.errors import DataError
from datasets_oc20.periodicity import unused_cell
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.targets import TargetSample, unlikely_size
from datasets_oc20.workers import as_they_finish

# OC20's own rules for the frames of S2EF: adsorption energy, and force on a free atom.
MAX_ENERGY, MAX_FORCE = 10.0, 50.0
# The shortest bond there is, H2, has 0.74 Å.
MIN_DISTANCE = 0.5
MAX_EXTENT = 1e4
"""Å; the limit of `equiformer2.graph.validation`."""

#: What can be wrong with a frame.
PROBLEMS = {
    "no tags": "no tags, which tell slab from adsorbate",
    "no fixed": "not said which atoms are fixed",
    "unreadable": "cannot be read",
    "no energy": "no energy",
    "no forces": "no forces",
    "large energy": f"adsorption energy beyond {MAX_ENERGY:g} eV, which OC20 leaves out",
    "large force": f"force on a free atom beyond {MAX_FORCE:g} eV/Å, which OC20 leaves out",
    "all fixed": "no free atom: no force to learn from",
    "no adsorbate": "no atom with tag 2 (adsorbate)",
    "tags and fixed differ": "tag 0 and fixed are not the same atoms, which in OC20 they are",
    "not periodic": "a whole cell, but pbc F F F: nothing is seen across its boundary",
    "other pbc": "other periodic directions than most frames",
    "spread": f"atoms more than {MAX_EXTENT:g} Å apart where nothing repeats, which no graph takes",
    "close atoms": f"atoms closer than {MIN_DISTANCE:g} Å",
    "same structure": "the same structure as another frame",
    "same name": "the same system and frame number as another frame",
}

_CHUNK = 200
_MISSING = re.compile(r"the record has no ([\w ]+);")


@dataclass(frozen=True)
class FrameFacts:
    """One frame; of a frame that cannot be read only `index`, `problems` and `message`.

    `energy` eV, `max_force` largest force on a free atom, eV/Å (NaN without); `squares` sum of the squares of
    the `components` of the forces on free atoms; `elements` atoms by atomic number, `tags` by tag.
    """

    index: int
    problems: list[str]
    message: str = ""
    sid: str = ""
    fid: int = 0
    natoms: int = 0
    energy: float = np.nan
    max_force: float = np.nan
    squares: float = 0.0
    components: int = 0
    fixed: int = 0
    elements: dict[int, int] = field(default_factory=dict)
    tags: dict[int, int] = field(default_factory=dict)
    structure: bytes = b""
    pbc: tuple[bool, ...] = ()


@dataclass
class Inspection:
    """What the inspected frames hold.

    One value per readable frame, in the order of the dataset: `natoms`, `energy` (eV, NaN without),
    `max_force` (eV/Å, NaN without). `forces_rms` of a component on a free atom, eV/Å. `systems` counts
    frames, `elements` and `tags` atoms. `problems` has the frames with each problem of `PROBLEMS`. `kind` is
    the declared kind of energy, `possible_kinds` those that the energies can be of.
    """

    natoms: np.ndarray
    energy: np.ndarray
    max_force: np.ndarray
    forces_rms: float
    fixed_share: float
    systems: Counter[str]
    elements: Counter[int]
    tags: Counter[int]
    problems: dict[str, list[FrameFacts]]
    kind: str | None
    possible_kinds: list[str]
    frames: int
    inspected: int


def inspect_dataset(
    dataset: OC20Lmdb, max_frames: int | None = None, num_workers: int | None = 1
) -> Inspection:
    """Read frames of `dataset`, evenly spread when there are more than `max_frames`.

    Frames that cannot be read are counted, not raised.

    Args:
        dataset: to inspect.
        max_frames: None for all.
        num_workers: processes; None takes one per core.
    """
    if max_frames is not None and max_frames < 1:
        raise DataError(f"max_frames is {max_frames}; it must be at least 1.")
    count = len(dataset)
    indices = np.unique(np.linspace(0, count - 1, min(max_frames or count, count)).astype(np.int64))
    chunks = [chunk.tolist() for chunk in np.array_split(indices, -(-len(indices) // _CHUNK))]
    facts: list[FrameFacts] = []
    with as_they_finish(partial(_inspect_frames, dataset), chunks, num_workers) as results:
        for part in results:
            facts += part
    return _gather(sorted(facts, key=lambda one: one.index), dataset)


def _gather(facts: list[FrameFacts], dataset: OC20Lmdb) -> Inspection:
    readable = [one for one in facts if one.natoms]
    systems, elements, tags = Counter[str](), Counter[int](), Counter[int]()
    for one in readable:
        systems[one.sid] += 1
        elements.update(one.elements)
        tags.update(one.tags)
    problems: dict[str, list[FrameFacts]] = {name: [] for name in PROBLEMS}
    for one in facts:
        for name in one.problems:
            problems[name].append(one)
    problems["same structure"] = _repeated(readable, [one.structure for one in readable])
    named = [one for one in readable if one.sid]
    problems["same name"] = _repeated(named, [(one.sid, one.fid) for one in named])
    pbcs = Counter(one.pbc for one in readable)
    if len(pbcs) > 1:
        most = pbcs.most_common(1)[0][0]
        problems["other pbc"] = [one for one in readable if one.pbc != most]
    components = sum(one.components for one in readable)
    natoms = np.array([one.natoms for one in readable], dtype=np.int64)
    energy = np.array([one.energy for one in readable])
    return Inspection(
        natoms=natoms,
        energy=energy,
        max_force=np.array([one.max_force for one in readable]),
        forces_rms=float(np.sqrt(sum(one.squares for one in readable) / components))
        if components
        else np.nan,
        fixed_share=sum(one.fixed for one in readable) / max(int(natoms.sum()), 1),
        systems=systems,
        elements=elements,
        tags=tags,
        problems={name: found for name, found in problems.items() if found},
        kind=dataset.energy_kind,
        possible_kinds=_possible_kinds(natoms, energy),
        frames=len(dataset),
        inspected=len(facts),
    )


def _repeated(facts: list[FrameFacts], keys: Sequence[object]) -> list[FrameFacts]:
    """Those whose key an earlier one has."""
    seen: set[object] = set()
    found = []
    for one, key in zip(facts, keys, strict=True):
        if key in seen:
            found.append(one)
        seen.add(key)
    return found


def _possible_kinds(natoms: np.ndarray, energy: np.ndarray) -> list[str]:
    """The kinds that these energies may well be of (targets.py)."""
    there = ~np.isnan(energy)
    if not there.any():
        return []
    sample = TargetSample(natoms[there, None].astype(float), energy[there], None)
    return [kind for kind in ("adsorption", "total") if unlikely_size(sample, kind) is None]


def _inspect_frames(dataset: OC20Lmdb, indices: Sequence[int]) -> list[FrameFacts]:
    return [_inspect_frame(dataset, index) for index in indices]


def _inspect_frame(dataset: OC20Lmdb, index: int) -> FrameFacts:
    try:
        data = dataset[index]
    except DataError as error:
        missing = _MISSING.search(str(error))
        names = [f"no {name}" for name in (missing[1].split(" and no ") if missing else [])]
        return FrameFacts(index, [name for name in names if name in PROBLEMS] or ["unreadable"], str(error))
    return _facts(index, data, dataset.energy_kind)


def _facts(index: int, data: Data, kind: str | None) -> FrameFacts:
    fixed, tags = data.fixed.numpy(), data.tags.numpy()
    numbers, pos = data.atomic_numbers.numpy(), data.pos.numpy()
    free = data.forces.numpy()[~fixed].astype(np.float64) if "forces" in data else np.zeros((0, 3))
    energy = data.energy.item() if "energy" in data else np.nan
    max_force = float(np.linalg.norm(free, axis=1).max()) if len(free) else np.nan
    cell, pbc = data.cell[0].numpy(), data.pbc[0].numpy()
    found = {
        "no energy": "energy" not in data,
        "no forces": "forces" not in data and "y_relaxed" not in data,
        "large energy": kind == "adsorption" and abs(energy) > MAX_ENERGY,
        "large force": max_force > MAX_FORCE,
        "all fixed": bool(fixed.all()),
        "no adsorbate": not (tags == 2).any(),
        "tags and fixed differ": not np.array_equal(tags == 0, fixed),
        "not periodic": unused_cell(cell, pbc),
        "spread": _extent(pos, cell, pbc) > MAX_EXTENT,
        "close atoms": _shortest_distance(pos, cell, pbc) < MIN_DISTANCE,
    }
    content = numbers.tobytes() + pos.tobytes() + cell.tobytes() + pbc.tobytes()
    return FrameFacts(
        index,
        [name for name, wrong in found.items() if wrong],
        sid=data.sid,
        fid=data.fid,
        natoms=len(numbers),
        energy=energy,
        max_force=max_force,
        squares=float((free * free).sum()),
        components=free.size,
        fixed=int(fixed.sum()),
        elements=dict(Counter(numbers.tolist())),
        tags=dict(Counter(tags.tolist())),
        structure=blake2b(content, digest_size=16).digest(),
        pbc=tuple(pbc.tolist()),
    )


def _extent(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> float:
    """Å that the atoms span beyond what the periodic lattice vectors do, along the worst of x, y and z."""
    if pbc.all():
        return 0.0
    lattice = cell * pbc[:, None]
    inside = pos - np.floor(pos @ np.linalg.pinv(lattice)) @ lattice
    return float((np.ptp(inside, axis=0) - np.abs(lattice).sum(axis=0)).max())


def _shortest_distance(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> float:
    """The shortest distance between two atoms, Å; exact when below half the height of the cell."""
    if len(pos) < 2:
        return np.inf
    first, second = _pairs(len(pos))
    vectors = pos[first].astype(np.float64) - pos[second]
    if pbc.any():
        whole = complete_cell(cell.astype(np.float64))
        vectors -= (np.round(vectors @ np.linalg.inv(whole)) * pbc) @ whole
    return float(np.sqrt((vectors * vectors).sum(axis=1).min()))


@lru_cache(maxsize=64)
def _pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.triu_indices(count, 1)
    return first, second

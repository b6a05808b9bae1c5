"""Inspection of a dataset: its sizes, energies, forces and elements, and its suspicious frames."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b

import numpy as np
from ase.geometry import complete_cell

from datasets_oc20.errors import DataError
from datasets_oc20.periodicity import unused_cell
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.targets import TargetSample
from datasets_oc20.workers import parallel_map

# OC20's own rules for the frames of S2EF: adsorption energy, and force on a free atom.
MAX_ENERGY, MAX_FORCE = 10.0, 50.0
# The shortest bond there is, H2, has 0.74 Å.
MIN_DISTANCE = 0.5
MAX_EXTENT = 1e4
"""Å; the limit of `equiformer2.graph`."""

#: Meaning of every problem of a frame, by name.
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
    """Properties of one frame; of a frame that cannot be read only `index`, `problems` and `message`.

    Attributes:
        index: in the dataset.
        problems: keys of `PROBLEMS` that concern the frame alone.
        message: error of a frame that cannot be read.
        sid: id of the system.
        fid: number of the frame.
        natoms: number of atoms; 0 if the frame cannot be read.
        energy: eV; NaN without.
        max_force: largest force on a free atom, eV/Å; NaN without.
        squares: sum of the squared force components on free atoms, eV²/Å².
        components: number of these components.
        fixed: number of fixed atoms.
        elements: atoms by atomic number.
        tags: atoms by tag.
        structure: digest of elements, positions, cell and `pbc`.
        pbc: periodic directions.
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

    @classmethod
    def read(cls, dataset: OC20Lmdb, index: int) -> "FrameFacts":
        """Read and check one frame; a frame that cannot be read has the problem "unreadable"."""
        try:
            data = dataset[index]
        except DataError as error:
            missing = _MISSING.search(str(error))
            names = [f"no {name}" for name in (missing[1].split(" and no ") if missing else [])]
            return cls(index, [name for name in names if name in PROBLEMS] or ["unreadable"], str(error))
        fixed, tags = data.fixed.numpy(), data.tags.numpy()
        numbers, pos = data.atomic_numbers.numpy(), data.pos.numpy()
        free = data.forces.numpy()[~fixed].astype(np.float64) if "forces" in data else np.zeros((0, 3))
        energy = data.energy.item() if "energy" in data else np.nan
        max_force = float(np.linalg.norm(free, axis=1).max()) if len(free) else np.nan
        cell, pbc = data.cell[0].numpy(), data.pbc[0].numpy()
        problems = {
            "no energy": "energy" not in data,
            "no forces": "forces" not in data and "y_relaxed" not in data,
            "large energy": dataset.energy_kind == "adsorption" and abs(energy) > MAX_ENERGY,
            "large force": max_force > MAX_FORCE,
            "all fixed": bool(fixed.all()),
            "no adsorbate": not (tags == 2).any(),
            "tags and fixed differ": not np.array_equal(tags == 0, fixed),
            "not periodic": unused_cell(cell, pbc),
            "spread": cls._extent(pos, cell, pbc) > MAX_EXTENT,
            "close atoms": cls._shortest_distance(pos, cell, pbc) < MIN_DISTANCE,
        }
        content = numbers.tobytes() + pos.tobytes() + cell.tobytes() + pbc.tobytes()
        return cls(
            index,
            [name for name, is_wrong in problems.items() if is_wrong],
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

    @staticmethod
    def _extent(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> float:
        """Extent of the atoms beyond the periodic lattice vectors, Å, along the worst of x, y and z."""
        if pbc.all():
            return 0.0
        lattice = cell * pbc[:, None]
        inside = pos - np.floor(pos @ np.linalg.pinv(lattice)) @ lattice
        return float((np.ptp(inside, axis=0) - np.abs(lattice).sum(axis=0)).max())

    @staticmethod
    def _shortest_distance(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> float:
        """Shortest distance between two atoms, Å; exact when below half the height of the cell."""
        if len(pos) < 2:
            return np.inf
        first, second = _atom_pairs(len(pos))
        vectors = pos[first].astype(np.float64) - pos[second]
        if pbc.any():
            whole = complete_cell(cell.astype(np.float64))
            vectors -= (np.round(vectors @ np.linalg.inv(whole)) * pbc) @ whole
        return float(np.sqrt((vectors * vectors).sum(axis=1).min()))


@lru_cache(maxsize=64)
def _atom_pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of both atoms of every pair among `count` atoms."""
    first, second = np.triu_indices(count, 1)
    return first, second


@dataclass
class Inspection:
    """Statistics and problems of the inspected frames.

    Attributes:
        natoms: `[n]` atoms of every readable frame, in the order of the dataset.
        energy: `[n]` eV; NaN without.
        max_force: `[n]` largest force on a free atom, eV/Å; NaN without.
        forces_rms: root mean square of a force component on a free atom, eV/Å.
        fixed_share: share of fixed atoms.
        systems: number of frames by system.
        elements: number of atoms by atomic number.
        tags: number of atoms by tag.
        problems: frames by problem of `PROBLEMS`.
        kind: declared kind of energy, or None.
        possible_kinds: kinds that the energies can be of, by their size.
        frames: number of frames in the dataset.
        inspected: number of frames inspected.
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

    @classmethod
    def from_facts(cls, facts: list[FrameFacts], dataset: OC20Lmdb) -> "Inspection":
        """Gather the facts of single frames, sorted by index, and compare the frames."""
        readable = [frame for frame in facts if frame.natoms]
        systems, elements, tags = Counter[str](), Counter[int](), Counter[int]()
        for frame in readable:
            systems[frame.sid] += 1
            elements.update(frame.elements)
            tags.update(frame.tags)
        problems = cls._find_problems(facts, readable)
        components = sum(frame.components for frame in readable)
        squares = sum(frame.squares for frame in readable)
        natoms = np.array([frame.natoms for frame in readable], dtype=np.int64)
        energy = np.array([frame.energy for frame in readable])
        has_energy = ~np.isnan(energy)
        possible_kinds = []
        if has_energy.any():
            sample = TargetSample(natoms[has_energy, None].astype(float), energy[has_energy], None)
            possible_kinds = [kind for kind in ("adsorption", "total") if sample.unlikely_size(kind) is None]
        return cls(
            natoms=natoms,
            energy=energy,
            max_force=np.array([frame.max_force for frame in readable]),
            forces_rms=float(np.sqrt(squares / components)) if components else np.nan,
            fixed_share=sum(frame.fixed for frame in readable) / max(int(natoms.sum()), 1),
            systems=systems,
            elements=elements,
            tags=tags,
            problems=problems,
            kind=dataset.energy_kind,
            possible_kinds=possible_kinds,
            frames=len(dataset),
            inspected=len(facts),
        )

    @staticmethod
    def _find_problems(facts: list[FrameFacts], readable: list[FrameFacts]) -> dict[str, list[FrameFacts]]:
        """Return the frames with each problem, those of comparisons between frames included."""

        def repeated(frames: list[FrameFacts], keys: Sequence[object]) -> list[FrameFacts]:
            seen: set[object] = set()
            repetitions = []
            for frame, key in zip(frames, keys, strict=True):
                if key in seen:
                    repetitions.append(frame)
                seen.add(key)
            return repetitions

        problems: dict[str, list[FrameFacts]] = {name: [] for name in PROBLEMS}
        for frame in facts:
            for name in frame.problems:
                problems[name].append(frame)
        problems["same structure"] = repeated(readable, [frame.structure for frame in readable])
        named = [frame for frame in readable if frame.sid]
        problems["same name"] = repeated(named, [(frame.sid, frame.fid) for frame in named])
        directions = Counter(frame.pbc for frame in readable)
        if len(directions) > 1:
            usual = directions.most_common(1)[0][0]
            problems["other pbc"] = [frame for frame in readable if frame.pbc != usual]
        return {name: frames for name, frames in problems.items() if frames}

    @property
    def num_suspicious(self) -> int:
        """Number of frames with at least one problem."""
        return len({frame.index for frames in self.problems.values() for frame in frames})


def inspect_dataset(
    dataset: OC20Lmdb, max_frames: int | None = None, num_workers: int | None = 1
) -> Inspection:
    """Read frames of a dataset, evenly spread when there are more than `max_frames`.

    Frames that cannot be read are counted, not raised.

    Args:
        dataset: the dataset.
        max_frames: maximum number of frames; None for all.
        num_workers: number of processes; None takes one per core.

    Raises:
        DataError: `max_frames` or `num_workers` is below 1.
    """
    if max_frames is not None and max_frames < 1:
        raise DataError(f"max_frames is {max_frames}; it must be at least 1.")
    count = len(dataset)
    indices = np.unique(np.linspace(0, count - 1, min(max_frames or count, count)).astype(np.int64))
    chunks = [chunk.tolist() for chunk in np.array_split(indices, -(-len(indices) // _CHUNK))]
    facts: list[FrameFacts] = []
    with parallel_map(partial(_read_frames, dataset), chunks, num_workers, in_order=False) as results:
        for chunk in results:
            facts += chunk
    return Inspection.from_facts(sorted(facts, key=lambda frame: frame.index), dataset)


def _read_frames(dataset: OC20Lmdb, indices: Sequence[int]) -> list[FrameFacts]:
    """Read and check several frames, in a worker."""
    return [FrameFacts.read(dataset, index) for index in indices]

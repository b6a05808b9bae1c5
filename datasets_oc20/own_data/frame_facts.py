"""Facts about one imported frame that its checks need, so that the frame itself need not stay in memory."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import find_mic

_NEAR_STEP = 1.0
"""Å; atoms of neighbouring frames of one trajectory in a collection of structures move less."""
_NEAR_CELL = 0.1
"""Relative change of a lattice vector between neighbouring frames of one trajectory."""
_SMALL_STEP = 0.2
"""Å; forces of both ends of a longer step tell too little about the difference in energy."""
ISOLATED = 6.0
"""Å; an atom farther than this from its own images is alone (reach of bonds; networks see up to 12 Å)."""
_PROJECTIONS = 8  # with three, some of 100,000 different frames of one slab agree


@dataclass(frozen=True)
class Origins:
    """Origins of the labels of a frame; frames of equal origins share one object.

    Attributes:
        tags: origin of the tags.
        fixed: origin of the fixed atoms.
        notices: kinds of notices that concern the frame, as `labels.notice_sentence` takes them.
    """

    tags: str = ""
    fixed: str = ""
    notices: tuple[str, ...] = ()


@dataclass(slots=True)
class FrameFacts:
    """One frame that can be used.

    Attributes:
        index: place in its file.
        natoms: number of atoms.
        composition: elements and their counts, by atomic number.
        energy: eV; NaN without.
        max_force: largest force on a free atom, eV/Å; NaN without forces.
        pbc: periodic directions.
        targets: names of the results that it has, of "energy", "forces" and "stress".
        atoms_digest: of the elements in their order and of the periodic directions.
        is_isolated: whether it is a single atom far from its images.
        signature: numbers that agree for the same positions and cell, wherever atoms are wrapped.
        run: number of its trajectory in the file.
        group: value of the group key, or empty.
        sid: name of its system.
        step: difference in energy (eV) to the frame before it, and that difference as the forces of both give
            it (eV); None where they do not tell.
        origins: where its labels come from.
        offset: place of its record in the file of its source.
        size: bytes of its record.
    """

    index: int
    natoms: int
    composition: tuple[tuple[int, int], ...]
    energy: float
    max_force: float
    pbc: tuple[bool, ...]
    targets: frozenset[str]
    atoms_digest: bytes
    is_isolated: bool
    signature: tuple[float, ...]
    run: int = 0
    group: str = ""
    sid: str = ""
    step: tuple[float, float] | None = None
    origins: Origins = Origins()
    offset: int = 0
    size: int = 0

    @classmethod
    def of(cls, index: int, fields: dict[str, Any]) -> "FrameFacts":
        """Collect the facts of the fields of a record."""
        numbers = np.asarray(fields["atomic_numbers"])
        elements, counts = np.unique(numbers, return_counts=True)
        pbc = np.asarray(fields["pbc"], dtype=bool)
        forces = fields.get("forces")
        free = np.zeros((0, 3)) if forces is None else forces[~fields["fixed"]]
        largest = (
            float(np.linalg.norm(free, axis=1).max()) if len(free) else (np.nan if forces is None else 0.0)
        )
        content = numbers.astype("<i4").tobytes() + pbc.tobytes()
        return cls(
            index=index,
            natoms=len(numbers),
            composition=tuple(zip(elements.tolist(), counts.tolist(), strict=True)),
            energy=float(fields.get("energy", np.nan)),
            max_force=largest,
            pbc=tuple(pbc.tolist()),
            targets=frozenset(fields.keys() & {"energy", "forces", "stress"}),
            atoms_digest=hashlib.blake2b(content, digest_size=8).digest(),
            is_isolated=len(numbers) == 1 and is_alone(np.asarray(fields["cell"]).reshape(3, 3), pbc),
            signature=_signature(fields),
        )

    @property
    def formula(self) -> str:
        """Elements and counts as text."""
        return formula(self.composition)

    @property
    def reduced(self) -> str:
        """Elements and their ratio as text."""
        divisor = int(np.gcd.reduce([count for _, count in self.composition]))
        return formula(tuple((number, count // divisor) for number, count in self.composition))


def formula(composition: tuple[tuple[int, int], ...]) -> str:
    """Write elements (atomic numbers) and their counts as a formula in Hill order."""
    numbers = [number for number, count in composition for _ in range(count)]
    return str(Atoms(numbers=numbers).get_chemical_formula(mode="hill"))


def is_alone(cell: np.ndarray, pbc: np.ndarray) -> bool:
    """Tell whether a single atom in a cell `[3, 3]` (Å) is farther than `ISOLATED` from all of its images."""
    if not pbc.any():
        return True
    # Shortest lattice vector of the periodic directions among small multiples.
    steps = np.array(np.meshgrid(*[(-1, 0, 1)] * 3)).reshape(3, -1).T
    steps = steps[steps.any(axis=1) & ~steps[:, ~pbc].any(axis=1)]
    return bool(np.linalg.norm(steps @ cell, axis=1).min() > ISOLATED)


def _signature(fields: dict[str, Any]) -> tuple[float, ...]:
    """Return sums over the atoms with fixed random weights (of phases in a cell), and the cell's size."""
    pos, cell = np.asarray(fields["pos"]), np.asarray(fields["cell"]).reshape(3, 3)
    weights = np.random.default_rng(0).uniform(-1, 1, size=(_PROJECTIONS, len(pos), 3))
    if (np.linalg.norm(cell, axis=1) < 1e-6).any():
        values = pos / 5.0
    else:
        values = np.sin(2 * np.pi * np.linalg.solve(cell.T, pos.T).T + 0.3)
    sums = (weights * values).sum(axis=(1, 2)) / np.sqrt(len(pos))
    return (*sums.tolist(), float(np.abs(np.linalg.det(cell)) ** (1 / 3)))


class RunFinder:
    """The trajectories in one file, found from its frames in order.

    Args:
        is_trajectory: the format holds one calculation, whose frames of the same atoms belong together;
            in a collection of structures neighbours must also be near each other.
    """

    def __init__(self, is_trajectory: bool) -> None:
        self._is_trajectory = is_trajectory
        self._previous: tuple[FrameFacts, dict[str, Any]] | None = None
        self._run = -1
        self._runs: dict[bytes, int] = {}

    def add(self, facts: FrameFacts, fields: dict[str, Any]) -> None:
        """Set `run` and `step` of the next frame."""
        previous = self._previous
        self._previous = facts, fields
        moved = None
        if previous is not None and previous[0].atoms_digest == facts.atoms_digest:
            moved = _displacement(previous[1], fields)
        if self._is_trajectory:
            facts.run = self._runs.setdefault(facts.atoms_digest, len(self._runs))
        else:
            is_near = moved is not None and np.linalg.norm(moved, axis=1).max() < _NEAR_STEP
            self._run += not is_near
            facts.run = self._run
        if previous is None or moved is None or facts.run != previous[0].run:
            return
        step = np.linalg.norm(moved, axis=1).max()
        same_cell = np.allclose(previous[1]["cell"], fields["cell"], atol=1e-6)
        if same_cell and 1e-5 < step < _SMALL_STEP and "forces" in fields and "forces" in previous[1]:
            mean = 0.5 * (previous[1]["forces"] + fields["forces"])
            facts.step = facts.energy - previous[0].energy, -float((mean * moved).sum())


def _displacement(before: dict[str, Any], after: dict[str, Any]) -> np.ndarray | None:
    """Return how far the atoms moved, `[N, 3]` Å in the new cell; None between unlike cells."""
    cell = np.asarray(after["cell"])
    lengths = np.linalg.norm(cell, axis=1)
    if (lengths < 1e-6).any():
        return np.asarray(after["pos"] - before["pos"])
    old = np.asarray(before["cell"])
    if (np.linalg.norm(cell - old, axis=1) > _NEAR_CELL * lengths).any():
        return None
    at_new_cell = np.linalg.solve(old.T, before["pos"].T).T @ cell
    return np.asarray(find_mic(after["pos"] - at_new_cell, cell, after["pbc"])[0])

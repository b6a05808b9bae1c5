"""Relax many structures in batches that stay full: converged structures are replaced by queued ones."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.batch_threads import map_all
from equiformer2.errors import InputError
from equiformer2.inference.committee import Committee, spread_sentence
from equiformer2.inference.predictor import Predictor


class _Pair(NamedTuple):
    moved: Tensor
    """`[N, 3]` Å: the last displacement, s."""
    change: Tensor
    """`[N, 3]` eV/Å: the change of the gradient along it, y."""
    rho: Tensor
    """`[B]`: 1 / (s · y); 0 where a structure has no such step, which takes the pair out of every sum."""


class BatchedLBFGS:
    """Limited-memory BFGS (Liu and Nocedal 1989) without line search, as `ase.optimize.LBFGS`.

    Every structure takes the steps that it would take alone. Structures can be added and taken out between
    steps. Everything is float64.

    Args:
        memory: steps to remember.
        max_step: largest displacement of an atom in one step, Å.
        alpha: first guess of the curvature, eV/Å².
        damping: factor on every step.
    """

    def __init__(
        self, memory: int = 50, max_step: float = 0.04, alpha: float = 70.0, damping: float = 1.0
    ) -> None:
        self.max_step, self.alpha, self.damping = max_step, alpha, damping
        self._pairs: deque[_Pair] = deque(maxlen=memory)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # positions, forces [N, 3]; known [B]

    def step(self, positions: Tensor, forces: Tensor, structure: Tensor, count: int) -> Tensor:
        """Compute the displacement `[N, 3]` Å of the next step.

        Args:
            positions: `[N, 3]` Å.
            forces: `[N, 3]` eV/Å, zero on atoms that must not move.
            structure: `[N]` the structure of each atom, 0 … count - 1.
            count: B, the number of structures.
        """

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return a.new_zeros(count).index_add(0, structure, (a * b).sum(dim=1))

        if self._last is not None:
            self._remember(positions, forces, structure, dot(*self._differences(positions, forces)))
        q, weights = -forces, []
        for pair in reversed(self._pairs):
            weights.append(pair.rho * dot(pair.moved, q))
            q = q - weights[-1][structure, None] * pair.change
        z = q / self.alpha
        for pair, weight in zip(self._pairs, reversed(weights), strict=True):
            z = z + pair.moved * (weight - pair.rho * dot(pair.change, z))[structure, None]
        self._last = (positions.clone(), forces.clone(), positions.new_ones(count, dtype=torch.bool))
        return -z * self._scale(z, structure, count)

    def _differences(self, positions: Tensor, forces: Tensor) -> tuple[Tensor, Tensor]:
        assert self._last is not None
        return positions - self._last[0], self._last[1] - forces

    def _remember(self, positions: Tensor, forces: Tensor, structure: Tensor, curvature: Tensor) -> None:
        assert self._last is not None
        # A structure that is new, or did not move, has no step to learn from.
        usable = self._last[2] & (curvature != 0)
        rho = torch.where(usable, 1.0 / torch.where(usable, curvature, 1.0), 0.0)
        moved, change = self._differences(positions, forces)
        keep = usable[structure, None]
        self._pairs.append(_Pair(torch.where(keep, moved, 0.0), torch.where(keep, change, 0.0), rho))

    def _scale(self, z: Tensor, structure: Tensor, count: int) -> Tensor:
        longest = z.new_zeros(count).scatter_reduce_(0, structure, z.norm(dim=1), reduce="amax")
        factor = torch.where(longest >= self.max_step, self.max_step / longest, 1.0)
        return self.damping * factor[structure, None]

    def add(self, atoms: int, structures: int) -> None:
        """Make room for new structures behind the present ones."""
        if self._last is None:
            return

        def longer(tensor: Tensor, more: int) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])

        positions, forces, known = self._last
        self._last = (longer(positions, atoms), longer(forces, atoms), longer(known, structures))
        self._pairs = deque(
            (_Pair(longer(s, atoms), longer(y, atoms), longer(rho, structures)) for s, y, rho in self._pairs),
            maxlen=self._pairs.maxlen,
        )

    def keep(self, atoms: Tensor, structures: Tensor) -> None:
        """Forget all but the atoms and structures of these masks, `[N]` and `[B]` bool."""
        if self._last is None:
            return
        positions, forces, known = self._last
        self._last = (positions[atoms], forces[atoms], known[structures])
        kept = (_Pair(s[atoms], y[atoms], rho[structures]) for s, y, rho in self._pairs)
        # Pairs older than all that are left would only cost time.
        self._pairs = deque((pair for pair in kept if bool(pair.rho.any())), maxlen=self._pairs.maxlen)


FRAMES = ("all", "ends")
#: On a CPU a batch is predicted in parts of as many structures, side by side (`batch_threads`). The number
#: does not depend on the number of threads, so that the results have the same bits with any.
STRUCTURES_AT_A_TIME = 4
#: Fields of a structure that a batch has; targets, which only some structures may have, have no place in it.
_IN_BATCH = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "tags", "fixed", "sid", "fid", "template")


@dataclass(frozen=True)
class RelaxationSettings:
    """Settings of a batched relaxation.

    The defaults of `fmax` and `steps` are the EquiformerV2 paper's for IS2RE, those of the optimiser are the
    options of OC20's relaxations (fairchem-core 1.10, TRAIN.md, `relax_opt`).

    Args:
        fmax: converged when no force on a free atom reaches it, eV/Å.
        steps: most steps of a structure.
        max_step: largest displacement of an atom in one step, Å.
        memory, alpha, damping: see `BatchedLBFGS`.
        frames: which frames of a relaxation to keep, "all" or "ends" (first and last).
        stop_at_spread: end a relaxation once the standard deviation of a free atom's force over the members
            of a committee exceeds this, eV/Å; None for never.

    Raises:
        InputError: a value that makes no sense.
    """

    fmax: float = 0.02
    steps: int = 200
    max_step: float = 0.04
    memory: int = 50
    alpha: float = 70.0
    damping: float = 1.0
    frames: str = "all"
    stop_at_spread: float | None = None

    def __post_init__(self) -> None:
        for name in ("fmax", "max_step", "alpha", "damping", "stop_at_spread"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}: give a positive number")
        if self.steps < 0:
            raise InputError(f"steps is {self.steps}: give 0 or more")
        if self.memory < 1:
            raise InputError(f"memory is {self.memory}: give 1 or more")
        if self.frames not in FRAMES:
            raise InputError(f"frames is {self.frames!r}; it must be one of {', '.join(FRAMES)}")


@dataclass(frozen=True)
class Frame:
    """One frame of a relaxation.

    Attributes:
        positions: `[N, 3]` float64 Å.
        forces, energy: the model's, `[N, 3]` eV/Å and eV. The energy may be NaN where a router was used.
        energy_std: standard deviation over the members of a committee, eV; None without one.
        max_force_std: likewise the largest of a free atom's force (`committee.largest_spread`), eV/Å.
    """

    positions: np.ndarray
    forces: np.ndarray
    energy: float
    energy_std: float | None = None
    max_force_std: float | None = None


@dataclass
class Relaxed:
    """One relaxed structure.

    Attributes:
        index: its number in the input.
        start: the structure as it was given.
        frames: of its relaxation, the last one included; none if the start cannot be relaxed at all.
            Positions are not wrapped into the cell.
        steps: steps taken.
        max_force: largest force on a free atom of the last frame, eV/Å.
        converged: whether that is below fmax.
        failure: why the relaxation ended early, or never began; the last frame is then the last good one.
        evaluations: calls of the model that it needed, a failed one included.
        stopped: sentence about the spread of a committee that ended it.
    """

    index: int
    start: Data
    frames: list[Frame] = field(default_factory=list)
    steps: int = 0
    max_force: float = math.inf
    converged: bool = False
    failure: str | None = None
    stopped: str | None = None
    evaluations: int = 0

    @property
    def energy(self) -> float:
        """Energy of the last frame, eV."""
        return self.frames[-1].energy

    @property
    def positions(self) -> np.ndarray:
        """Positions of the last frame, `[N, 3]` float64 Å."""
        return self.frames[-1].positions

    def fail(self, reason: str) -> None:
        """End the relaxation early; a step under way does not count."""
        self.failure = reason
        if self.frames:
            self.steps -= 1

    @property
    def name(self) -> str:
        """Name of the structure in messages."""
        return f"structure {self.start.sid}" if self.start.get("sid") else f"structure {self.index}"


Predict = Callable[[Batch], dict[str, Tensor]]


def free_forces(predictor: Predictor | Committee) -> Predict:
    """`predictor.predict` for relaxations, which read no forces on held atoms: these are given as zero.

    Less is computed; the structures move as they would with all forces.
    """
    if not predictor.has_forces:
        return predictor.predict

    def predict(batch: Batch) -> dict[str, Tensor]:
        return predictor.predict(batch, force_atoms=~batch.fixed.bool())

    return predict


def relax_batched(
    predict: Predict,
    structures: Iterable[tuple[int, Data]],
    settings: RelaxationSettings | None = None,
    *,
    batch_size: int = 32,
    max_atoms: int | None = None,
    device: str | torch.device = "cpu",
    side_by_side: bool = True,
) -> Iterator[Relaxed]:
    """Relax structures and give each as soon as it is done.

    A structure leaves the batch when it has converged or has taken all its steps, and the next one that waits
    takes its place. One that fails on the way (a force that is not finite) leaves with its last good frame,
    and one whose start has no meaningful energy (an unknown element, no cell) without a frame; neither
    disturbs the others. When the device runs out of memory, half of the batch waits.

    Args:
        predict: `free_forces(predictor)` or `Predictor.predict`, of a network or a committee with forces.
        structures: (number, structure) in the order in which they start; read as places become free.
        settings: of the relaxation.
        batch_size: maximum number of structures per batch.
        max_atoms: maximum number of atoms per batch; a structure that has more is relaxed alone.
        device: where the optimiser's state lives.
        side_by_side: on a CPU, call `predict` for parts of the batch in several threads at once.

    Raises:
        InputError: a structure that alone does not fit into the device's memory, or something that is not
            about one structure, such as a network without forces.
    """
    for name, value in (("batch_size", batch_size), ("max_atoms", max_atoms)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: give 1 or more")
    settings = settings or RelaxationSettings()
    running = _Running(settings, torch.device(device), side_by_side)
    waiting = _Waiting(structures)
    while True:
        running.add(waiting.take(batch_size - len(running.relaxing), max_atoms, running.atoms))
        if not running.relaxing:
            return
        try:
            out = running.predict(predict)
        except torch.OutOfMemoryError as error:
            if len(running.relaxing) == 1:
                raise InputError(
                    f"{running.relaxing[0].name} with {running.atoms} atoms does not fit into the memory of "
                    f"{device}: use another device or precision"
                ) from error
            waiting.return_(running.release_half())
            max_atoms = running.atoms
            continue
        except InputError as error:
            at, first = error.structure, running.relaxing[0]
            if at is None and len(running.relaxing) == 1 and first.frames:
                at = 0  # it has been predicted before: the error is about where it went
            if at is None:
                raise
            yield running.fail(at, str(error))
            continue
        if "forces" not in out:
            raise InputError(
                "this model predicts no forces, so it cannot relax a structure: "
                "use a checkpoint trained with forces (model.forces)"
            )
        if settings.stop_at_spread is not None and "forces_std" not in out:
            raise InputError("stop_at_spread needs a committee: give several checkpoints")
        yield from running.advance(out)


class _Waiting:
    """Structures that wait; those that were put back come first and go on where they were."""

    def __init__(self, structures: Iterable[tuple[int, Data]]) -> None:
        self._rest = iter(structures)
        self._first: deque[tuple[Relaxed, Tensor]] = deque()

    def return_(self, relaxing: list[tuple[Relaxed, Tensor]]) -> None:
        self._first.extendleft(reversed(relaxing))

    def take(self, places: int, max_atoms: int | None, atoms: int) -> list[tuple[Relaxed, Tensor]]:
        """Up to `places` structures that fit beside `atoms` atoms; the next one waits until it fits."""
        taken: list[tuple[Relaxed, Tensor]] = []
        while len(taken) < places:
            if not self._first:
                following = next(self._rest, None)
                if following is None:
                    break
                index, start = following
                self._first.append((Relaxed(index, start), start.pos.double()))
            more = len(self._first[0][1])
            if max_atoms is not None and atoms and atoms + more > max_atoms:
                break
            atoms += more
            taken.append(self._first.popleft())
        return taken


class _Running:
    """The structures of the batch, their positions and the optimiser."""

    def __init__(self, settings: RelaxationSettings, device: torch.device, side_by_side: bool) -> None:
        self.settings, self.device = settings, device
        self._in_parts = side_by_side and device.type == "cpu"
        self.relaxing: list[Relaxed] = []
        self._positions = torch.zeros(0, 3, dtype=torch.float64, device=device)
        self._optimizer = BatchedLBFGS(settings.memory, settings.max_step, settings.alpha, settings.damping)
        self._collate()

    @property
    def atoms(self) -> int:
        return len(self._positions)

    def add(self, waiting: list[tuple[Relaxed, Tensor]]) -> None:
        if not waiting:
            return
        self.relaxing += [relaxing for relaxing, _ in waiting]
        positions = torch.cat([positions.to(self.device) for _, positions in waiting])
        self._positions = torch.cat([self._positions, positions])
        self._optimizer.add(len(positions), len(waiting))
        self._collate()

    def release_half(self) -> list[tuple[Relaxed, Tensor]]:
        """Take out the later half of the structures, with their positions."""
        count = len(self.relaxing)
        positions = self._positions.cpu().split(self._natoms.tolist())
        first = count // 2
        released = list(zip(self.relaxing[first:], positions[first:], strict=True))
        self._keep(torch.arange(count) < first)
        return released

    def predict(self, predict: Predict) -> dict[str, Tensor]:
        """Outputs for all structures, in parts of `_collate`, which are side by side on a CPU."""
        for batch, positions in zip(self._batches, self._positions.cpu().split(self._sizes), strict=True):
            batch.pos = positions

        def named(part: tuple[int, Batch]) -> dict[str, Tensor]:
            first, batch = part
            try:
                return predict(batch)
            except InputError as error:
                if error.structure is not None:
                    error.structure += first
                raise

        firsts = range(0, len(self.relaxing), self._part)
        outs = map_all(named, list(zip(firsts, self._batches, strict=False)), self.device)
        return {name: torch.cat([out[name] for out in outs]) for name in outs[0]}

    def fail(self, at: int, reason: str) -> Relaxed:
        """Take out the structure `at`, which cannot go on."""
        failed = self.relaxing[at]
        failed.evaluations += 1
        failed.fail(reason)
        self._keep(torch.arange(len(self.relaxing)) != at)
        return failed

    def advance(self, out: dict[str, Tensor]) -> list[Relaxed]:
        """Record the frame, take out and return who is done, move the others."""
        count, natoms = len(self.relaxing), self._natoms.tolist()
        raw = out["forces"].to(self.device)
        forces = torch.where(self._fixed[:, None], 0.0, raw.double())
        largest = forces.new_zeros(count).scatter_reduce_(0, self._structure, forces.norm(dim=1), "amax")
        finite = torch.isfinite(raw).all(dim=1).double()
        good = forces.new_ones(count).scatter_reduce_(0, self._structure, finite, "amin").bool().cpu()
        energies = out["energy"].view(-1).double().cpu()
        good &= torch.isfinite(energies)
        spreads = self._spreads(out)
        parts = zip(self._positions.cpu().split(natoms), raw.cpu().split(natoms), strict=True)
        done = []
        for at, ((positions, part), force) in enumerate(zip(parts, largest.tolist(), strict=True)):
            relaxing = self.relaxing[at]
            relaxing.evaluations += 1
            if not good[at]:
                relaxing.fail(f"the model gives a non-finite energy or force at step {relaxing.steps}")
                done.append(at)
                continue
            frame = Frame(positions.numpy().copy(), part.numpy().copy(), float(energies[at]), *spreads[at])
            if self.settings.frames == "ends" and len(relaxing.frames) == 2:
                relaxing.frames.pop()
            relaxing.frames.append(frame)
            relaxing.max_force, relaxing.converged = force, force < self.settings.fmax
            limit, spread = self.settings.stop_at_spread, frame.max_force_std
            if limit is not None and spread is not None and spread > limit and not relaxing.converged:
                relaxing.stopped = spread_sentence(spread, limit)
                done.append(at)
            elif relaxing.converged or relaxing.steps >= self.settings.steps:
                done.append(at)
            else:
                relaxing.steps += 1
        finished = [self.relaxing[at] for at in done]
        if done:
            stays = torch.ones(count, dtype=torch.bool)
            stays[done] = False
            forces = forces[self._keep(stays)]
        if self.relaxing:
            self._positions = self._positions + self._optimizer.step(
                self._positions, forces, self._structure, len(self.relaxing)
            )
        return finished

    def _spreads(self, out: dict[str, Tensor]) -> list[tuple[float, float] | tuple[()]]:
        """Spread of a committee, of the energy and of the forces on free atoms, by structure."""
        count = len(self.relaxing)
        if "forces_std" not in out:
            return [()] * count
        lengths = torch.where(self._fixed, 0.0, out["forces_std"].to(self.device).double().norm(dim=1))
        largest = lengths.new_zeros(count).scatter_reduce_(0, self._structure, lengths, "amax")
        return list(zip(out["energy_std"].double().tolist(), largest.tolist(), strict=True))

    def _keep(self, structures: Tensor) -> Tensor:
        """Forget all other structures; returns the mask of the atoms that are left."""
        structures = structures.to(self.device)
        atoms = structures[self._structure]
        self._optimizer.keep(atoms, structures)
        self._positions = self._positions[atoms]
        self.relaxing = [
            relaxing for relaxing, stays in zip(self.relaxing, structures.tolist(), strict=True) if stays
        ]
        self._collate()
        return atoms

    def _collate(self) -> None:
        """Tensors that change only with the composition of the batch."""
        starts = [relaxing.start for relaxing in self.relaxing]
        natoms = [start.pos.shape[0] for start in starts]
        self._natoms = torch.tensor(natoms, dtype=torch.int64)
        self._structure = torch.repeat_interleave(torch.arange(len(starts)), self._natoms).to(self.device)
        fixed = [start.fixed.bool() for start in starts]
        self._fixed = (torch.cat(fixed) if fixed else torch.zeros(0, dtype=torch.bool)).to(self.device)
        data = [Data(**{name: start[name] for name in _IN_BATCH if name in start}) for start in starts]
        self._part = STRUCTURES_AT_A_TIME if self._in_parts else max(1, len(data))
        parts = [data[first : first + self._part] for first in range(0, len(data), self._part)]
        self._batches = [Batch.from_data_list(part) for part in parts]
        self._sizes = [len(batch.pos) for batch in self._batches]

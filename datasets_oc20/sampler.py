"""Batch sampler with limits on structures, atoms and edges, which balances the load of ranks."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from torch.utils.data import Sampler

from datasets_oc20.errors import DataError

WINDOW = 64
"""Steps whose batches are balanced together. The remaining imbalance falls with their number: where batches
hold one structure, 16 steps leave four times as much as 64."""
CLOSE = 0.01
"""Imbalance, in the worst step, up to which no structures of other steps are used."""


@dataclass(frozen=True)
class Imbalance:
    """Excess load of the most loaded rank over the mean over ranks, as a share of the mean.

    Attributes:
        mean: over the steps of an epoch.
        worst: in the worst step.
        total: over whole epochs, the rank with the largest sum.
    """

    mean: float
    worst: float
    total: float

    @classmethod
    def from_loads(cls, loads: np.ndarray) -> "Imbalance":
        """Compute the imbalance of `loads` `[steps, ranks]`, such as numbers of atoms."""
        share = loads.max(axis=1) / loads.mean(axis=1) - 1.0
        sums = loads.sum(axis=0)
        return cls(float(share.mean()), float(share.max()), float(sums.max() / sums.mean() - 1.0))


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches of dataset indices; the whole sequence is a function of (`seed`, epoch).

    Structures are taken in shuffled (or stored) order and a batch is closed before it would exceed a
    limit. Every epoch has the same number of batches, because Lightning asks once: 2 % more than the first
    order needs. Where an order needs fewer, the largest are split; where it needs more, the structures of the
    smallest are put into the gaps of the others (and in the rare case that there is none wait for the
    next epoch).

    For several ranks, batches are formed globally and every rank gets the same number of them: a batch is
    split where the number does not divide, and structures are repeated only when there are fewer than ranks.
    The structures of a step are then dealt out anew, so that its batches have nearly equal loads. Where that
    is not enough (it leaves little to choose when batches are small), the structures of `WINDOW` neighbouring
    steps are dealt out together, and batches of the most similar load make up a step.

    An order is held as one array; batches are made while they are asked for.

    Args:
        length: number of structures.
        batch_size: maximum number of structures in a batch.
        natoms: `[length]` atoms per structure; needed for the two limits and for balancing.
        max_atoms: maximum number of atoms in a batch.
        max_edges: maximum number of edges in a batch, counted as `max_neighbors` per atom: the upper bound of
            the model's graph, which dense structures reach.
        max_neighbors: edges counted per atom.
        shuffle: a new order in every epoch.
        seed: random seed of the order.
        rank: number of this process.
        world_size: number of processes.

    Ranks are balanced by atoms, and so by edges where every atom has `max_neighbors`
    (`benchmarks/measure_batches.py` counts them).

    Raises:
        DataError: a limit is not positive, or a single structure is larger than a batch may be.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        natoms: np.ndarray | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        max_neighbors: int = 20,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_atoms", max_atoms), ("max_edges", max_edges)):
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1.")
        if natoms is None and (max_atoms is not None or max_edges is not None):
            raise DataError("max_atoms and max_edges need the number of atoms of every structure.")
        self.natoms = np.ones(length, dtype=np.int32) if natoms is None else natoms
        self._max_atoms = self._atom_limit(max_atoms, max_edges, max_neighbors)
        self.length, self.batch_size = length, batch_size
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self.epoch = 0
        self._cached: tuple[int, _Packed] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the next pass."""
        self.epoch = epoch

    @property
    def sampler(self) -> Self:
        """This object: Lightning calls `set_epoch` on `batch_sampler.sampler`."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over the batches of this rank."""
        return self.batches_from(0)

    def __len__(self) -> int:
        """Return the number of batches of this rank, the same in every epoch."""
        return len(self._packed()) // self.world_size

    def batches_from(self, first: int) -> Iterator[list[int]]:
        """Iterate over the batches of this rank from number `first` on; those before it cost nothing."""
        packed = self._packed()
        if self.world_size == 1:
            for number in range(first, len(packed)):
                yield packed[number].tolist()
            return
        for start in range(first - first % WINDOW, len(self), WINDOW):
            for number, step in enumerate(self._window(packed, start), start):
                if number >= first:
                    yield step[self.rank].tolist()

    def imbalance(self) -> Imbalance:
        """Compute the imbalance of the numbers of atoms in the current epoch."""
        packed = self._packed()
        return Imbalance.from_loads(
            np.array(
                [
                    [self._sum(batch) for batch in step]
                    for start in range(0, len(self), WINDOW)
                    for step in self._window(packed, start)
                ],
                dtype=np.float64,
            )
        )

    def _atom_limit(self, max_atoms: int | None, max_edges: int | None, max_neighbors: int) -> int | None:
        """Maximum number of atoms in a batch under both limits; None without a limit."""
        limits = [] if max_atoms is None else [max_atoms]
        limits += [] if max_edges is None else [max_edges // max_neighbors]
        if not limits:
            return None
        cap, largest = min(limits), int(self.natoms.argmax())
        if self.natoms[largest] > cap:
            raise DataError(
                f"record {largest} has {self.natoms[largest]} atoms, more than the {cap} that "
                "max_atoms or max_edges allow in a batch; raise the limit."
            )
        return cap

    # ---- an epoch's order, cut into batches

    def _packed(self) -> "_Packed":
        """Return the batches of all ranks in the current epoch."""
        if self._cached is None or self._cached[0] != self.epoch:
            packed = self._pack(self._order(self.epoch))
            if self.shuffle and self._max_atoms is not None:
                packed = self._with_count(packed, self._fixed_count)
            if self.world_size > 1:
                packed = packed.divisible_by(self.world_size)
            self._cached = (self.epoch, packed)
        return self._cached[1]

    @cached_property
    def _fixed_count(self) -> int:
        needed = len(self._pack(self._order(0)))
        return min(needed + max(1, needed // 50), self.length)

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.length)
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def _pack(self, order: np.ndarray) -> "_Packed":
        total = np.concatenate([[0], np.cumsum(self.natoms[order], dtype=np.int64)])
        ends, start = [0], 0
        while start < len(order):
            end = start + self.batch_size
            if self._max_atoms is not None:
                end = min(end, int(total.searchsorted(total[start] + self._max_atoms, side="right")) - 1)
            start = min(end, len(order))
            ends.append(start)
        return _Packed(order, np.array(ends))

    def _with_count(self, packed: "_Packed", count: int) -> "_Packed":
        """Split or join batches until there are exactly `count`."""
        if len(packed) <= count:
            return packed.split_to(count)
        lengths = np.diff(packed.ends)
        surplus = np.zeros(len(packed), dtype=bool)
        surplus[np.argsort(lengths, kind="stable")[: len(packed) - count]] = True
        unplaced = np.concatenate([packed[number] for number in np.flatnonzero(surplus).tolist()])
        batches = [packed[number] for number in np.flatnonzero(~surplus).tolist()]
        atoms = np.array([self._sum(batch) for batch in batches], dtype=np.float64)
        atoms[[len(batch) == self.batch_size for batch in batches]] = np.inf
        for index in unplaced[np.lexsort((unplaced, -self.natoms[unplaced]))]:
            lightest = int(atoms.argmin())
            if not atoms[lightest] + self.natoms[index] <= self._max_atoms:
                continue
            batches[lightest] = np.append(batches[lightest], index)
            full = len(batches[lightest]) == self.batch_size
            atoms[lightest] = np.inf if full else atoms[lightest] + self.natoms[index]
        return _Packed(np.concatenate(batches), np.cumsum([0, *map(len, batches)]))

    # ---- several ranks

    def _window(self, packed: "_Packed", start: int) -> list[list[np.ndarray]]:
        """Return the batches of all ranks in up to `WINDOW` steps from step `start` on."""
        numbers = range(start * self.world_size, min(start + WINDOW, len(self)) * self.world_size)
        batches = [packed[number] for number in numbers]
        ranks = self.world_size
        steps = [self._deal(batches[i : i + ranks]) for i in range(0, len(batches), ranks)]
        if (
            Imbalance.from_loads(np.array([[self._sum(batch) for batch in step] for step in steps])).worst
            <= CLOSE
        ):
            return steps
        dealt = self._deal(batches)
        loads = np.array([self._sum(batch) for batch in dealt])
        by_load = np.argsort(loads, kind="stable").reshape(-1, self.world_size)
        by_load[1::2] = by_load[1::2, ::-1]  # no rank always has the largest of its step
        if self.shuffle:
            by_load = np.random.default_rng([self.seed, self.epoch, start]).permutation(by_load)
        return [[dealt[number] for number in step] for step in by_load]

    def _sum(self, batch: np.ndarray) -> int:
        return int(self.natoms[batch].sum(dtype=np.int64))

    def _deal(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        """Deal the structures out anew, largest first, in rounds: a round's largest to the lightest batch.

        The batches are returned unchanged where that would exceed a limit or repeat or lose a structure.
        """
        pool = np.concatenate(batches)
        count = len(batches)
        pool = pool[np.lexsort((pool, -self.natoms[pool]))]
        if len(np.unique(pool)) < len(pool) or -(-len(pool) // count) > self.batch_size:
            return batches
        loads = np.zeros(count, dtype=np.int64)
        owner = np.empty(len(pool), dtype=np.int64)
        for start in range(0, len(pool), count):
            round_ = slice(start, min(start + count, len(pool)))
            lightest = np.argsort(loads, kind="stable")[: round_.stop - start]
            owner[round_] = lightest
            loads[lightest] += self.natoms[pool[round_]]
        if self._max_atoms is not None and loads.max() > self._max_atoms:
            return batches
        by_owner = pool[np.argsort(owner, kind="stable")]
        return np.split(by_owner, np.cumsum(np.bincount(owner, minlength=count))[:-1])


class _Packed:
    """Batches as one array of indices and the positions where it is cut, `ends[0] = 0`."""

    def __init__(self, order: np.ndarray, ends: np.ndarray) -> None:
        self.order, self.ends = order, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.order[self.ends[number] : self.ends[number + 1]]

    def split_to(self, count: int) -> "_Packed":
        """Halve the largest batch again and again until there are `count`, or as many as structures."""
        lengths = np.diff(self.ends)
        largest = list(zip((-lengths).tolist(), self.ends[:-1].tolist(), strict=True))
        heapq.heapify(largest)
        cuts: list[int] = []
        while len(self) + len(cuts) < count and -largest[0][0] > 1:
            length, start = -largest[0][0], largest[0][1]
            heapq.heapreplace(largest, (-(length // 2), start))
            heapq.heappush(largest, (length // 2 - length, start + length // 2))
            cuts.append(start + length // 2)
        return _Packed(self.order, np.sort(np.concatenate([self.ends, np.array(cuts, dtype=np.int64)])))

    def divisible_by(self, ranks: int) -> "_Packed":
        """Split batches into a multiple of `ranks`; where all hold one structure, repeat the first ones."""
        packed = self.split_to(-(-len(self) // ranks) * ranks)
        missing = -len(packed) % ranks
        if not missing:
            return packed
        repeated = np.resize(packed.order, missing)
        ends = packed.ends[-1] + np.arange(1, missing + 1)
        return _Packed(np.concatenate([packed.order, repeated]), np.concatenate([packed.ends, ends]))

"""Batches limited by structures, atoms or edges, shared out equally between ranks."""

from collections.abc import Iterator
from functools import cached_property
from typing import Self

import numpy as np
from torch.utils.data import Sampler

from datasets_oc20.errors import DataError


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches of dataset indices; the whole sequence is a function of (`seed`, epoch).

    Structures are taken in shuffled (or stored) order and a batch is closed before it would exceed a
    limit. Every epoch has the same number of batches, because Lightning asks once: 2 % more than the first
    order needs. Where an order needs fewer, the largest are split; where it needs more, the structures of the
    smallest are put into the gaps of the others (and in the rare case that there is none wait for the
    next epoch).

    For several ranks, batches are formed globally, the structures of `world_size` neighbouring batches
    are dealt out anew so that the ranks have nearly equal numbers of atoms (as OC20's
    BalancedBatchSampler does), and every rank gets the same number of batches: a batch is split where
    the number does not divide, and structures are repeated only when there are fewer than ranks.

    Args:
        length: number of structures.
        batch_size: most structures in a batch.
        natoms: `[length]` atoms per structure; needed for the two limits and for balancing.
        max_atoms: most atoms in a batch.
        max_edges: most edges in a batch, counting `max_neighbors` for every atom, which is the most
            that the model's graph can have.
        max_neighbors: edges counted per atom.
        shuffle: a new order in every epoch.
        seed: start of the order.
        rank: this process.
        world_size: number of processes.

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
        limits = [
            limit for limit in (max_atoms, max_edges and max_edges // max_neighbors) if limit is not None
        ]
        self.atom_limit = min(limits) if limits else None
        if self.atom_limit is not None and natoms is None:
            raise DataError("max_atoms and max_edges need the number of atoms of every structure.")
        self.natoms = np.ones(length, dtype=np.int64) if natoms is None else natoms.astype(np.int64)
        if self.atom_limit is not None and self.natoms.max() > self.atom_limit:
            largest = int(self.natoms.argmax())
            raise DataError(
                f"record {largest} has {self.natoms[largest]} atoms, more than the {self.atom_limit} that "
                "max_atoms or max_edges allow in a batch; raise the limit."
            )
        self.length, self.batch_size = length, batch_size
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self.epoch = 0
        self._cached: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    @property
    def sampler(self) -> Self:
        """Lightning looks for `set_epoch` on `batch_sampler.sampler`."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def __len__(self) -> int:
        """Number of batches of this rank, the same in every epoch."""
        return len(self._batches())

    def _batches(self) -> list[list[int]]:
        if self._cached is None or self._cached[0] != self.epoch:
            batches = self._pack(self._order(self.epoch))
            if self.shuffle and self.atom_limit is not None:
                batches = self._with_count(batches, self._fixed_count)
            if self.world_size > 1:
                batches = self._share_out(batches)
            self._cached = (self.epoch, batches)
        return self._cached[1]

    @cached_property
    def _fixed_count(self) -> int:
        needed = len(self._pack(self._order(0)))
        return min(needed + max(1, needed // 50), self.length)

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.length)
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def _pack(self, order: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = []
        atoms = 0
        for index in order.tolist():
            size = int(self.natoms[index])
            full = bool(batches) and len(batches[-1]) == self.batch_size
            if not batches or full or (self.atom_limit is not None and atoms + size > self.atom_limit):
                batches.append([])
                atoms = 0
            batches[-1].append(index)
            atoms += size
        return batches

    def _with_count(self, batches: list[list[int]], count: int) -> list[list[int]]:
        """Exactly `count` batches."""
        while len(batches) < count:
            _split_largest(batches)
        if len(batches) == count:
            return batches
        by_length = sorted(range(len(batches)), key=lambda number: (len(batches[number]), number))
        surplus = set(by_length[: len(batches) - count])
        homeless = [index for number in surplus for index in batches[number]]
        kept = [batch for number, batch in enumerate(batches) if number not in surplus]
        atoms = np.array([self.natoms[batch].sum() for batch in kept], dtype=np.float64)
        atoms[[len(batch) == self.batch_size for batch in kept]] = np.inf
        for index in sorted(homeless, key=lambda i: (-self.natoms[i], i)):
            lightest = int(atoms.argmin())
            if self.atom_limit is not None and atoms[lightest] + self.natoms[index] > self.atom_limit:
                continue
            kept[lightest].append(index)
            full = len(kept[lightest]) == self.batch_size
            atoms[lightest] = np.inf if full else atoms[lightest] + self.natoms[index]
        return kept

    def _share_out(self, batches: list[list[int]]) -> list[list[int]]:
        """The batches of this rank."""
        repeated = 0
        while len(batches) % self.world_size:
            if not _split_largest(batches):
                batches.append(batches[repeated])
                repeated += 1
        groups = [batches[i : i + self.world_size] for i in range(0, len(batches), self.world_size)]
        return [self._balance(group)[self.rank] for group in groups]

    def _balance(self, group: list[list[int]]) -> list[list[int]]:
        """Deal the structures of a group out again, largest first, each to the batch with fewest atoms."""
        size = max(len(batch) for batch in group)
        dealt: list[list[int]] = [[] for _ in group]
        atoms = [0] * len(group)
        pool = sorted((index for batch in group for index in batch), key=lambda i: (-self.natoms[i], i))
        for index in pool:
            open_batches = [number for number in range(len(group)) if len(dealt[number]) < size]
            lightest = min(open_batches, key=lambda number: (atoms[number], number))
            dealt[lightest].append(index)
            atoms[lightest] += int(self.natoms[index])
        if not all(dealt) or (self.atom_limit is not None and max(atoms) > self.atom_limit):
            return group
        return dealt


def _split_largest(batches: list[list[int]]) -> bool:
    """Halve the batch with most structures; False when all have one."""
    largest = max(range(len(batches)), key=lambda number: len(batches[number]))
    batch = batches[largest]
    if len(batch) == 1:
        return False
    batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return True

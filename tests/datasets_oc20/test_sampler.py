"""Batches: complete, within limits, repeatable, and equal in number on every rank."""

import itertools

import numpy as np
import pytest

from datasets_oc20 import DataError
from datasets_oc20.sampler import WINDOW, BalancedBatchSampler

NATOMS = np.random.default_rng(0).integers(10, 90, 101)


def test_every_structure_once_and_within_the_limits() -> None:
    sampler = BalancedBatchSampler(101, 8, NATOMS, max_atoms=200, shuffle=True)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(101))
    assert len(sampler) == len(batches)
    assert max(len(batch) for batch in batches) <= 8
    assert max(NATOMS[batch].sum() for batch in batches) <= 200


def test_batches_are_closed_only_when_full() -> None:
    batches = list(BalancedBatchSampler(101, 8, NATOMS, max_atoms=200))
    for batch, following in itertools.pairwise(batches):
        assert len(batch) == 8 or NATOMS[batch].sum() + NATOMS[following[0]] > 200


def test_edges_count_max_neighbors_per_atom() -> None:
    sampler = BalancedBatchSampler(101, 8, NATOMS, max_edges=3000, max_neighbors=20)
    assert max(20 * NATOMS[batch].sum() for batch in sampler) <= 3000
    assert list(sampler) == list(BalancedBatchSampler(101, 8, NATOMS, max_atoms=150))
    assert list(sampler) == list(BalancedBatchSampler(101, 8, NATOMS, max_atoms=190, max_edges=3000))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BalancedBatchSampler(101, 8, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert list(BalancedBatchSampler(10, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    sampler = BalancedBatchSampler(101, 8, shuffle=True)
    assert list(sampler) == list(sampler)  # no hidden state
    sampler.sampler.set_epoch(1)  # where Lightning looks for it
    assert list(sampler) == order(0, 1)


def test_every_epoch_has_the_same_number_of_batches() -> None:
    # Lightning asks for the length once: a shorter epoch would skip validation, a longer one lose its end.
    sampler = BalancedBatchSampler(101, 8, NATOMS, max_atoms=200, shuffle=True)
    plain = {len(sampler._pack(sampler._order(epoch))) for epoch in range(30)}
    assert min(plain) < len(sampler) < max(plain)  # so both corrections are seen below
    lengths, complete = set(), 0
    for epoch in range(30):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        lengths.add(len(batches))
        indices = [index for batch in batches for index in batch]
        assert len(set(indices)) == len(indices) >= 100
        complete += len(indices) == 101
        assert max(NATOMS[batch].sum() for batch in batches) <= 200
        assert all(1 <= len(batch) <= 8 for batch in batches)
    assert lengths == {len(sampler)}
    assert complete >= 29


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("max_atoms", [None, 150])
@pytest.mark.parametrize("epoch", [0, 1])
def test_ranks_get_equal_numbers_and_nothing_twice(
    world_size: int, max_atoms: int | None, epoch: int
) -> None:
    ranks = []
    for rank in range(world_size):
        sampler = BalancedBatchSampler(
            101, 4, NATOMS, max_atoms=max_atoms, shuffle=True, rank=rank, world_size=world_size
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(101))
    assert all(1 <= len(batch) <= 4 for batches in ranks for batch in batches)
    if max_atoms is not None:
        assert all(NATOMS[batch].sum() <= max_atoms for batches in ranks for batch in batches)


def test_ranks_are_balanced_by_atoms() -> None:
    sizes = np.array([100, 100, 100, 100, 10, 10, 10, 10])
    ranks = [list(BalancedBatchSampler(8, 4, sizes, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [sizes[batches[0]].sum() for batches in ranks] == [220, 220]  # unbalanced: 400 and 40


def test_fewer_structures_than_ranks_are_repeated() -> None:
    ranks = [list(BalancedBatchSampler(2, 4, NATOMS[:2], rank=rank, world_size=3)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [1, 1, 1]
    assert {i for batches in ranks for batch in batches for i in batch} == {0, 1}


def test_impossible_limits() -> None:
    with pytest.raises(DataError, match=r"record \d+ has 89 atoms.* 80 .*max_atoms"):
        BalancedBatchSampler(101, 8, NATOMS, max_atoms=80)
    with pytest.raises(DataError, match="max_atoms is 0"):
        BalancedBatchSampler(101, 8, NATOMS, max_atoms=0)
    with pytest.raises(DataError, match="batch_size is 0"):
        BalancedBatchSampler(101, 0)
    with pytest.raises(DataError, match="need the number of atoms"):
        BalancedBatchSampler(101, 8, max_atoms=200)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_small_batches_are_balanced_over_several_steps(batch_size: int) -> None:
    sizes = np.random.default_rng(1).integers(15, 200, 4000)
    sampler = BalancedBatchSampler(4000, batch_size, sizes, shuffle=True, world_size=8)
    found = sampler.imbalance()
    assert found.mean < 0.03
    assert found.total < 0.001
    whole = list(sampler)
    for first in (1, WINDOW - 1, WINDOW, WINDOW + 20, len(whole)):
        assert list(sampler.batches_from(first)) == whole[first:]


def test_a_step_of_equal_structures_is_the_batch_of_one_process() -> None:
    one = list(BalancedBatchSampler(96, 8, np.full(96, 33), shuffle=True))
    two = [BalancedBatchSampler(96, 4, np.full(96, 33), shuffle=True, rank=r, world_size=2) for r in (0, 1)]
    assert [sorted(left + right) for left, right in zip(*two, strict=True)] == [sorted(b) for b in one]

"""The search on the device finds what the search on the CPU finds."""

import pytest
import torch
from ase.build import bulk, fcc111, molecule
from graph_helpers import Structures, edges, environments, graph_of, structures
from test_radius_graph import random_structure

from equiformer2.errors import InputError
from equiformer2.graph import device_search, radius_graph
from equiformer2.graph.nonblocking import numbers_of

slab = fcc111("Cu", size=(2, 2, 3), vacuum=8.0)
slab.rattle(0.05, seed=1)
slab.positions += 7.0


def both(s: Structures, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[object, object]:
    expected = graph_of(s, **options)
    module = __import__("sys").modules[radius_graph.__module__]
    monkeypatch.setattr(module, "on_device", lambda device: True)
    return expected, graph_of(s, **options)


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_every_pair(seed: int, periodic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    s = random_structure(seed, periodic)
    expected, found = both(s, monkeypatch, max_radius=6.0, max_neighbors=10_000)
    assert edges(found.edge_index, found.cell_offsets) == edges(expected.edge_index, expected.cell_offsets)


@pytest.mark.parametrize("strict", [True, False])
def test_a_batch_with_a_neighbour_limit(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    copper, one = bulk("Cu", a=3.6), molecule("H")
    s = structures(slab, copper, molecule("H2O"), one, dtype=torch.float64)
    # Every candidate in a pass of its own.
    monkeypatch.setattr(device_search, "_CANDIDATES_AT_A_TIME", 1)
    expected, found = both(s, monkeypatch, strict=strict)
    for ours, theirs in zip(environments(found), environments(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "mask", [[], [False], [True], [True, False, True, True, False], [False, False, True]]
)
def test_numbers_of_a_mask(mask: list[bool]) -> None:
    entries = torch.tensor(mask, dtype=torch.bool)
    assert torch.equal(numbers_of(entries, sum(mask)), entries.nonzero().squeeze(1))


def test_large_structures_go_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_search, "MAX_CANDIDATES", 10)
    s = structures(slab)
    expected, found = both(s, monkeypatch)
    assert torch.equal(found.edge_index, expected.edge_index)


def test_atoms_on_top_of_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = slab.copy()
    broken.positions[3] = broken.positions[5]
    both(structures(slab), monkeypatch)
    with pytest.raises(InputError, match="atoms 3 and 5 of the structure are"):
        graph_of(structures(broken))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    s = structures(slab, bulk("Cu", a=3.6))
    expected, found = graph_of(s), graph_of(Structures(*(t.cuda() for t in s)))
    assert found.vectors.is_cuda
    assert torch.equal(
        environments(expected)[1], environments(type(found)(*(t.cpu() for t in vars(found).values())))[1]
    )

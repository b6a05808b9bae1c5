"""Radius graphs against a search of every image, and their edge cases."""

from collections import Counter

import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from graph_helpers import Structures, all_pairs, edges, graph_of, structures

from equiformer2.graph import radius_graph, search


def random_structure(seed: int, periodic: bool) -> Structures:
    """A skewed cell with 1 to 6 atoms, up to two cells outside it, and any kind of pbc."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    cell = torch.diag(uniform(2.0, 6.0, 3)) + uniform(-1.0, 1.0, 3, 3)
    atoms = int(torch.randint(1, 7, (1,), generator=generator))
    pbc = torch.ones(3, dtype=torch.bool) if periodic else torch.rand(3, generator=generator) < 0.5
    return Structures(uniform(-2, 2, atoms, 3) @ cell, cell[None], pbc[None], torch.tensor([atoms]))


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_every_pair_in_reach_is_an_edge(seed: int, periodic: bool) -> None:
    s = random_structure(seed, periodic)
    graph = graph_of(s, max_radius=6.0, max_neighbors=10_000)
    assert edges(graph.edge_index, graph.cell_offsets) == Counter(
        (j, i, *image) for _, j, i, image in all_pairs(s, 6.0)
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("max_neighbors", [1, 8, 20])
@pytest.mark.parametrize("seed", range(4))
def test_the_neighbour_limit_keeps_the_nearest(seed: int, max_neighbors: int, strict: bool) -> None:
    s = random_structure(seed, periodic=True)
    graph = graph_of(s, 9.0, max_neighbors, strict)
    pairs = sorted(all_pairs(s, 9.0))
    for atom in range(len(s.pos)):
        every = torch.tensor([d for d, _, i, _ in pairs if i == atom], dtype=torch.float64)
        kept = graph.distances[graph.edge_index[1] == atom]
        if strict or len(every) <= max_neighbors:
            expected = every[:max_neighbors]
        else:
            # fairchem-core 1.10.0: squared distance of neighbour k + 1 plus 0.01 Å^2.
            expected = every[every**2 <= every[max_neighbors] ** 2 + 0.01]
        torch.testing.assert_close(kept, expected, rtol=0, atol=1e-9)


def test_non_strict_keeps_the_whole_shell() -> None:
    # An fcc atom has 12, 6, 24 neighbours at a/sqrt(2), a, a sqrt(3/2).
    s = structures(bulk("Cu", a=3.6))
    assert graph_of(s, 8.0, 12, strict=True).edge_index.shape[1] == 12
    assert graph_of(s, 8.0, 12, strict=False).edge_index.shape[1] == 18
    assert graph_of(s, 8.0, 13, strict=False).edge_index.shape[1] == 18
    assert graph_of(s, 8.0, 18, strict=False).edge_index.shape[1] == 42


def test_the_cutoff_is_inclusive() -> None:
    s = structures(Atoms("H2", [[0, 0, 0], [3, 0, 0]]))
    assert graph_of(s, max_radius=3.0).edge_index.shape[1] == 2
    assert graph_of(s, max_radius=2.9999995).edge_index.shape[1] == 0


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("max_neighbors", [5, 20])
def test_the_short_first_search_changes_nothing(
    max_neighbors: int, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab = fcc111("Pt", (3, 3, 4), vacuum=8.0)
    adatom = Atoms("O", [slab.positions[-1] + [0.3, 0.2, 4.5]])
    slab.rattle(0.05, seed=1)
    # Enough within the short cutoff, not enough for the atom far above, and no other atom at all.
    for atoms in (slab, slab + adatom, Atoms("He", cell=[30, 30, 30], pbc=True)):
        s = structures(atoms)
        graphs = []
        for first in (search.FIRST_CUTOFF, 1.0, float("inf")):
            monkeypatch.setattr(search, "FIRST_CUTOFF", first)
            graphs.append(graph_of(s, 12.0, max_neighbors, strict))
            monkeypatch.undo()
        for graph in graphs[1:]:
            assert torch.equal(graphs[0].edge_index, graph.edge_index)
            assert torch.equal(graphs[0].vectors, graph.vectors)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_the_short_first_search_near_its_limit(
    seed: int, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Clusters in which the atom at the rim has about as many neighbours in the short cutoff as it keeps.
    generator = torch.Generator().manual_seed(seed)
    pos = 7.0 * torch.rand(16, 3, generator=generator)
    pbc = torch.zeros(1, 3, dtype=torch.bool)
    s = Structures(pos, torch.zeros(1, 3, 3), pbc, torch.tensor([len(pos)]))
    short = graph_of(s, 12.0, 5, strict)
    monkeypatch.setattr(search, "FIRST_CUTOFF", float("inf"))
    assert torch.equal(short.edge_index, graph_of(s, 12.0, 5, strict).edge_index)


def test_the_short_first_search_does_not_cut_the_shell() -> None:
    # Atom 0: neighbours at 1, 2.9999 and 3.0005 Å, the last one outside the first cutoff of 3 Å for one
    # neighbour, but within 0.01 Å^2 of the second.
    pos = [[0, 0, 0], [1, 0, 0], [2.9999, 0, 0], [2.8, (3.0005**2 - 2.8**2) ** 0.5, 0]]
    graph = graph_of(structures(Atoms("H4", pos)), 12.0, 1, strict=False)
    assert graph.edge_index[0, graph.edge_index[1] == 0].tolist() == [1, 2, 3]


def test_vectors_follow_their_definition() -> None:
    s = structures(fcc111("Cu", (2, 2, 3), vacuum=7.0, periodic=True), bulk("NaCl", "rocksalt", a=5.64))
    s.pos[3] += 2 * s.cell[0, 0] - s.cell[0, 1]  # outside its cell
    graph = graph_of(s)
    source, target = graph.edge_index
    structure = torch.repeat_interleave(s.natoms)
    assert torch.equal(structure[source], structure[target])
    offset = torch.stack(
        [o.float() @ s.cell[b] for o, b in zip(graph.cell_offsets, structure[target], strict=True)]
    )
    torch.testing.assert_close(graph.vectors, s.pos[source] - s.pos[target] + offset, rtol=0, atol=1e-5)
    torch.testing.assert_close(graph.distances, graph.vectors.norm(dim=1))
    assert graph.cell_offsets.dtype == graph.edge_index.dtype == torch.int64
    assert graph.distances.max() <= 12.0


def test_edges_are_sorted_by_target_then_distance() -> None:
    graph = graph_of(structures(fcc111("Cu", (3, 2, 3), vacuum=7.0), molecule("C2H6"), bulk("Cu")))
    target = graph.edge_index[1]
    assert (target.diff() >= 0).all()
    same = target.diff() == 0
    assert (graph.distances.diff()[same] >= -2e-5).all()


def test_two_calls_give_the_same_bits() -> None:
    slab = fcc111("Ni", (3, 3, 3), vacuum=7.0)
    for strict in (True, False):
        one, two = (graph_of(structures(slab, bulk("Cu")), strict=strict) for _ in range(2))
        assert torch.equal(one.edge_index, two.edge_index)
        assert torch.equal(one.cell_offsets, two.cell_offsets)
        assert torch.equal(one.vectors, two.vectors)


def test_hundreds_of_images() -> None:
    s = structures(bulk("Cu"))
    graph = graph_of(s, max_radius=12.0, max_neighbors=10_000)
    assert graph.edge_index.shape[1] == len(all_pairs(s, 12.0)) > 500


def test_atoms_without_neighbours() -> None:
    lone = Atoms("He", cell=[40, 40, 40], pbc=True)
    graph = graph_of(structures(lone, molecule("H2"), Atoms("Ar")))
    assert edges(graph.edge_index, graph.cell_offsets) == Counter({(1, 2, 0, 0, 0): 1, (2, 1, 0, 0, 0): 1})


@pytest.mark.parametrize("atoms", [Atoms("He"), Atoms("He2", [[0, 0, 0], [20, 0, 0]]), Atoms()])
def test_zero_edges(atoms: Atoms) -> None:
    s = structures(atoms)
    s.pos.requires_grad_()
    s.cell.requires_grad_()
    graph = graph_of(s)
    assert graph.edge_index.shape == (2, 0)
    assert graph.cell_offsets.shape == graph.vectors.shape == (0, 3)
    assert graph.distances.shape == (0,)
    assert graph.edge_index.dtype == graph.cell_offsets.dtype == torch.int64
    graph.distances.sum().backward()
    assert torch.equal(s.pos.grad, torch.zeros_like(s.pos))
    assert torch.equal(s.cell.grad, torch.zeros_like(s.cell))


def test_a_non_periodic_axis_needs_no_lattice_vector() -> None:
    slab = fcc111("Cu", (2, 2, 3), vacuum=None)
    slab.pbc = [True, True, False]
    slab.positions[:, 2] -= 5.0
    bare, tall = slab.copy(), slab.copy()
    bare.cell[2] = 0.0
    tall.cell[2] = [0.0, 0.0, 90.0]
    one, two = graph_of(structures(bare)), graph_of(structures(tall))
    assert edges(one.edge_index, one.cell_offsets) == edges(two.edge_index, two.cell_offsets)
    assert torch.equal(one.vectors, two.vectors)


def test_pbc_may_differ_within_a_batch() -> None:
    cell = [4.0, 4.0, 4.0]
    kinds = [[True, True, True], [True, False, False], [False, False, False]]
    graph = graph_of(structures(*(Atoms("Ar", cell=cell, pbc=pbc) for pbc in kinds)), max_radius=4.5)
    assert torch.bincount(graph.edge_index[1], minlength=3).tolist() == [6, 2, 0]
    assert graph.cell_offsets[graph.edge_index[1] == 1].abs().tolist() == [[1, 0, 0], [1, 0, 0]]


def test_gradients_reach_positions_and_cell() -> None:
    s = random_structure(3, periodic=True)
    batch = Structures(*(torch.cat(pair) for pair in zip(s, random_structure(5, True), strict=True)))

    def lengths(pos: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        graph = radius_graph(
            pos, cell, batch.pbc, batch.natoms, max_radius=5.0, max_neighbors=10_000, strict=True
        )
        return graph.vectors, graph.distances

    assert torch.autograd.gradcheck(
        lengths, (batch.pos.clone().requires_grad_(), batch.cell.clone().requires_grad_())
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_input_gives_the_same_graph() -> None:
    s = structures(fcc111("Cu", (3, 3, 3), vacuum=7.0), bulk("Cu"))
    one, two = graph_of(s), graph_of(Structures(*(column.cuda() for column in s)))
    assert two.vectors.is_cuda
    assert two.edge_index.is_cuda
    assert torch.equal(one.edge_index, two.edge_index.cpu())
    torch.testing.assert_close(one.vectors, two.vectors.cpu())

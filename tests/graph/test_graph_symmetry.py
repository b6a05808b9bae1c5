"""The same structure written down differently gives the same graph, ties at the cut included."""

from dataclasses import replace

import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, fcc211
from graph_helpers import Structures, environments, graph_of, structures

from equiformer2.graph import RadiusGraph


def real_slab() -> Atoms:
    slab = fcc211("Pt", (3, 2, 2), vacuum=8.0)
    slab.pbc = True
    slab.rattle(0.05, seed=3)
    return slab


def perfect_slab() -> Atoms:
    """Each atom has more than 20 neighbours in shells of equal distance: every cut at 20 is a tie."""
    return fcc111("Cu", (3, 3, 4), vacuum=8.0, periodic=True)


SLABS = {"rattled": real_slab(), "perfect": perfect_slab()}


def assert_same(one: RadiusGraph, two: RadiusGraph, tolerance: float = 2e-5) -> None:
    for a, b in zip(environments(one)[:2], environments(two)[:2], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(environments(one)[2], environments(two)[2], rtol=0, atol=tolerance)


slabs = pytest.mark.parametrize("slab", SLABS.values(), ids=SLABS.keys())
strictness = pytest.mark.parametrize("strict", [True, False])


@slabs
@strictness
@pytest.mark.parametrize("shift", [(1.0, 0.0, 0.0), (0.37, -1.91, 4.2), (-9.0, 3.3, 11.0)])
def test_origin(slab: Atoms, strict: bool, shift: tuple[float, float, float]) -> None:
    moved = slab.copy()
    moved.translate(shift)
    one = graph_of(structures(slab), strict=strict)
    assert_same(one, graph_of(structures(moved), strict=strict))
    moved.wrap()
    assert_same(one, graph_of(structures(moved), strict=strict))


@slabs
@strictness
def test_atoms_in_other_periodic_images(slab: Atoms, strict: bool) -> None:
    s = structures(slab)
    images = torch.randint(-2, 3, (len(s.pos), 3), generator=torch.Generator().manual_seed(0))
    moved = Structures(s.pos + images.float() @ s.cell[0], *s[1:])
    one, two = graph_of(s, strict=strict), graph_of(moved, strict=strict)
    assert_same(one, two, tolerance=5e-5)


@slabs
@strictness
def test_numbering_of_the_atoms(slab: Atoms, strict: bool) -> None:
    s = structures(slab)
    new_to_old = torch.randperm(len(s.pos), generator=torch.Generator().manual_seed(0))
    graph = graph_of(Structures(s.pos[new_to_old], *s[1:]), strict=strict)
    renamed = replace(graph, edge_index=new_to_old[graph.edge_index])
    assert_same(graph_of(s, strict=strict), renamed)


@slabs
@strictness
def test_supercell(slab: Atoms, strict: bool) -> None:
    one = graph_of(structures(slab), strict=strict)
    repeated = graph_of(structures(slab.repeat((2, 1, 1))), strict=strict)
    for copy in range(2):
        here = repeated.edge_index[1] // len(slab) == copy
        part = RadiusGraph(
            repeated.edge_index[:, here] % len(slab),
            repeated.cell_offsets[here],
            repeated.vectors[here],
            repeated.distances[here],
        )
        assert_same(one, part, tolerance=5e-5)


@strictness
def test_another_cell_of_the_same_lattice(strict: bool) -> None:
    primitive = bulk("Cu", a=3.61)
    skewed = primitive.copy()
    skewed.cell[2] += 2 * skewed.cell[0] - skewed.cell[1]
    assert_same(graph_of(structures(primitive), strict=strict), graph_of(structures(skewed), strict=strict))
    left_handed = primitive.copy()
    left_handed.cell[:] = primitive.cell[[1, 0, 2]]
    assert_same(
        graph_of(structures(primitive), strict=strict), graph_of(structures(left_handed), strict=strict)
    )


def test_rotation_keeps_the_distances() -> None:
    slab = real_slab()
    turned = slab.copy()
    turned.rotate(33.0, (1, 2, 3), rotate_cell=True)
    one = graph_of(structures(slab, dtype=torch.float64))
    two = graph_of(structures(turned, dtype=torch.float64))
    torch.testing.assert_close(one.distances, two.distances, rtol=0, atol=1e-9)

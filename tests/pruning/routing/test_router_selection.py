"""From scores to atoms: budgets, thresholds, gates, ties, hysteresis."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.geometry import get_distances
from routing_helpers import as_data, exact_model, masks, molecule_data, slab_atoms
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.pruning.routing import (
    AtomPruner,
    DegreeRouter,
    DistanceRouter,
    EdgePruner,
    StaticRouter,
    with_thresholds,
)
from equiformer2.pruning.routing.batch_geometry import FAR, BatchGeometry
from equiformer2.pruning.routing.geometric_routers import static_priority
from equiformer2.pruning.routing.score_selection import select, smoothstep, tie_groups


def pick(
    scores: list[float], level: float, mode: str = "topk", sizes: tuple[int, ...] = (), **options: object
):  # type: ignore[no-untyped-def]
    natoms = torch.tensor(sizes or (len(scores),))
    structure = torch.repeat_interleave(torch.arange(len(natoms)), natoms)
    return select(torch.tensor(scores), structure, natoms, mode, level, 0.1, **options).tolist()  # type: ignore[arg-type]


def test_a_budget_is_met_in_every_structure_by_itself() -> None:
    # All of the second structure scores lower than all of the first.
    assert (
        pick([9, 8, 7, 6, 1, 2, 3, 4], 0.5, sizes=(4, 4))
        == [True, True, False, False] + [False] * 2 + [True] * 2
    )
    assert pick([1, 2, 3], 0.0) == [True] * 3
    assert pick([1, 2, 3], 1.0) == [False] * 3


@pytest.mark.parametrize("level", np.linspace(0, 1, 11).tolist())
def test_ties_are_never_cut(level: float) -> None:
    chosen = pick([1, 2, 2 * (1 + 5e-5), 2, 5, 2, 1], level)
    assert chosen[1] == chosen[2] == chosen[3] == chosen[5]
    assert chosen[0] == chosen[6]
    chosen = pick([1, 2, 2 * (1 + 5e-5), 2, 5, 2, 1], 2.00004, "threshold")
    assert chosen[1] == chosen[2] == chosen[3] == chosen[5]


def test_ties_end_at_the_tolerance_and_at_the_structure() -> None:
    scores, structure = torch.tensor([1.0, 1.0005, 1.0]), torch.tensor([0, 0, 1])
    assert tie_groups(scores, structure).tolist() == [1, 0, 2]


def test_repeated_structures_keep_the_same_atoms() -> None:
    scores = [0.1, 0.5, 0.9, 0.3, 0.7]
    for level in np.linspace(0, 1, 21):
        assert pick(scores * 3, float(level)) == pick(scores, float(level)) * 3


def test_hysteresis_keeps_what_was_there() -> None:
    before = torch.tensor([False, True, False])
    assert pick([0.5, 0.45, 0.2], 0.48, "threshold", previous=before, hysteresis=0.1) == [True, True, False]
    assert pick([0.5, 0.45, 0.2], 2 / 3, previous=before, hysteresis=0.1) == [False, True, False]
    assert pick([0.5, 0.45, 0.2], 2 / 3) == [True, False, False]


def test_gates_have_compact_support_and_no_kinks() -> None:
    x = torch.linspace(-0.5, 1.5, 2001, dtype=torch.float64, requires_grad=True)
    gate = smoothstep(x)
    (slope,) = torch.autograd.grad(gate.sum(), x)
    assert not gate[x <= 0].any()
    assert (gate[x >= 1] == 1).all()
    assert slope.diff().abs().max() < 0.007


def system_of(*atoms) -> BatchGeometry:  # type: ignore[no-untyped-def]
    batch = Batch.from_data_list([as_data(a) for a in atoms])
    return BatchGeometry.from_batch(batch, exact_model().build_graph(batch))


def test_distances_to_the_adsorbate_are_periodic() -> None:
    atoms = slab_atoms(0.1)
    # A skewed cell, atoms outside of it, and another system in the batch.
    atoms.set_cell(atoms.cell.array @ np.eye(3))
    cell = atoms.cell.array.copy()
    cell[1] += 2 * cell[0]
    atoms.set_cell(cell)
    atoms.positions[3] += cell[0] - cell[1]
    found = system_of(slab_atoms(0.05, "CO"), atoms).to_adsorbate[-len(atoms) :]
    members = atoms.get_tags() == 2
    # ASE reduces the cell itself.
    exact = get_distances(atoms.positions, atoms.positions[members], cell, True)[1].min(axis=1)
    assert not found[torch.tensor(members)].any()
    near = exact < FAR - 0.5
    assert near.sum() > 5
    # The smooth minimum lies below, by at most 0.2 Å times the logarithm of the number of neighbours.
    difference = exact[near & ~members] - found.numpy()[near & ~members]
    assert (difference > -1e-9).all()
    assert (difference < 0.4).all()


def test_distances_have_no_kink_where_they_end() -> None:
    model, step = exact_model(), 0.02
    found = []
    for apart in np.arange(8.5, 11.5, step):
        atoms = Atoms("CuO", [[0, 0, 0], [0, 0, apart]], cell=[30, 30, 40], pbc=True, tags=[0, 2])
        batch = Batch.from_data_list([as_data(atoms)])
        found.append(float(BatchGeometry.from_batch(batch, model.build_graph(batch)).to_adsorbate[0]))
    slopes = np.diff(found) / step
    assert slopes[0] == pytest.approx(1.0, abs=1e-9)
    assert slopes[-1] == 0.0
    assert found[-1] == FAR
    # A kink would be a change by 1.
    assert np.abs(np.diff(slopes)).max() < 0.05


def test_distances_without_an_adsorbate_and_without_cell() -> None:
    assert (system_of(slab_atoms(0.1, None)).to_adsorbate == FAR).all()
    data = Batch.from_data_list([molecule_data()])
    system = BatchGeometry.from_batch(data, exact_model().build_graph(data))
    exact = torch.cdist(data.pos, data.pos[data.tags == 2]).min(dim=1).values
    assert (system.to_adsorbate - exact).abs().max() < 0.2


def test_static_order() -> None:
    atoms = slab_atoms(0.1)
    system = system_of(atoms)
    score = static_priority(system)
    tags, free = system.tags, system.free

    def all_above(first: Tensor, second: Tensor) -> bool:
        return bool(score[first].min() > score[second].max())

    assert all_above(tags == 2, (tags == 1) & free)
    assert all_above((tags == 1) & free, tags == 0)
    below = (tags == 0).nonzero().squeeze(1)
    assert torch.equal(score[below].argsort(), (-system.to_free[below]).argsort())
    # Tag and hold are two things.
    atoms.constraints[0].index = np.array([0, 1, 8])
    system = system_of(atoms)
    score = static_priority(system)
    assert score[2] > score[8] > score[0]


def test_thresholds_from_budgets() -> None:
    model = exact_model()
    batch = Batch.from_data_list([as_data(slab_atoms(0.1)), as_data(slab_atoms(0.05, "CO"))])
    router = with_thresholds(StaticRouter(0.5), model, [batch])
    assert router.mode == "threshold"
    assert router.levels[0] is None
    score = static_priority(BatchGeometry.from_batch(batch, model.build_graph(batch)))
    assert (score > router.levels[1]).double().mean() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(InputError, match="from budgets"):
        with_thresholds(router, model, [batch])


def test_free_atoms_and_adsorbate_can_be_kept() -> None:
    model, data = exact_model(), as_data(slab_atoms(0.1))
    kept = ~data.fixed | (data.tags == 2)
    for level in (0.4, 0.9):
        for mask in masks(model, DegreeRouter(level, keep_free=True), data):
            assert mask[kept].all()
            assert int(mask.sum()) == max(int(kept.sum()), round((1 - level) * len(mask)))
    assert not torch.stack(masks(model, DegreeRouter(0.4), data))[:, kept].all()


def test_refusals() -> None:
    with pytest.raises(InputError, match="mode 'best' is not known"):
        StaticRouter(0.5, mode="best")
    with pytest.raises(InputError, match=r"a level is 1\.5"):
        DistanceRouter(1.5)
    with pytest.raises(InputError, match="width of the gates is 0"):
        StaticRouter(0.5, mode="smooth", width=0)
    with pytest.raises(InputError, match="a level is nan"):
        StaticRouter(float("nan"), mode="threshold")
    with pytest.raises(InputError, match="the levels are None"):
        StaticRouter(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a level is 'much'"):
        StaticRouter(["much"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="keep_free is about atoms"):
        EdgePruner(0.5, keep_free=True)
    with pytest.raises(InputError, match="hysteresis is about atoms"):
        EdgePruner(0.5, hysteresis=0.1)
    model, data = exact_model(), molecule_data()
    with pytest.raises(InputError, match="the heads of 1 blocks"):
        AtomPruner(0.5, heads=[[True]])(model, Batch.from_data_list([data]))
    with pytest.raises(InputError, match="levels for 2 blocks but the network has 4"):
        StaticRouter([0.1, 0.2])(model, Batch.from_data_list([data]))
    del data.tags
    with pytest.raises(InputError, match="needs `tags`"):
        StaticRouter(0.5)(model, Batch.from_data_list([data]))

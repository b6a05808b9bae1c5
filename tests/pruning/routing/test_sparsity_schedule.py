"""Genetic search of the sparsity of every block, and what a router achieves."""

from collections.abc import Sequence

import pytest
import torch
from routing_helpers import as_data, exact_model, slab_atoms
from torch_geometric.data import Batch

from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.errors import InputError
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.cost.operations import count_macs
from equiformer2.pruning.routing import (
    ActiveRegion,
    RandomRouter,
    RoutedModel,
    ScheduleObjective,
    StaticRouter,
    search_schedule,
)
from equiformer2.pruning.routing.sparsity_schedule import uniform_schedule

WEIGHTS = (0.0, 5.0, 1.0, 0.2, 3.0, 0.0)


def toy(levels: Sequence[float]) -> tuple[float, float]:
    """Blocks cost the same; skipping hurts each by another amount, the more the more is skipped."""
    loss = sum(weight * level**2 for weight, level in zip(WEIGHTS, levels, strict=True))
    return loss, 1 - sum(levels) / len(levels)


def test_the_search_finds_the_schedule_of_the_least_loss() -> None:
    options = {"protected": (0, 5), "generations": 20, "tolerance": 0.01, "seed": 0}
    found = search_schedule(toy, 6, 0.8, **options)
    assert 0.79 <= found.macs <= 0.8
    assert found.levels[0] == found.levels[5] == 0.0
    # Block 3 costs least, block 1 most.
    assert found.levels[3] > found.levels[2] > found.levels[1]
    uniform = toy([0, 0.3, 0.3, 0.3, 0.3, 0])[0]
    assert found.loss < 0.6 * uniform
    assert list(found.history) == sorted(found.history, reverse=True)
    assert search_schedule(toy, 6, 0.8, **options) == found


def test_the_first_and_the_last_block_are_part_of_the_search() -> None:
    """`toy` loses nothing by skipping there, so the search does; where it costs most, it does not."""
    found = search_schedule(toy, 6, 0.8, generations=20, tolerance=0.01, seed=0)
    assert min(found.levels[0], found.levels[5]) > max(found.levels[1:5])
    assert found.loss < search_schedule(toy, 6, 0.8, protected=(0, 5), generations=20, tolerance=0.01).loss

    def dear_ends(levels: Sequence[float]) -> tuple[float, float]:
        return toy(levels)[0] + 100 * (levels[0] ** 2 + levels[5] ** 2), toy(levels)[1]

    found = search_schedule(dear_ends, 6, 0.8, generations=1, population=4, tolerance=0.01, seed=0)
    # The schedule that leaves them alone is tried from the beginning.
    assert found.loss <= toy([0.0, 0.32, 0.32, 0.32, 0.32, 0.0])[0]
    assert max(found.levels[0], found.levels[5]) < 0.05


def test_operations_are_no_way_to_a_better_schedule() -> None:
    """All blocks alike: nothing but more operations could lower the loss."""

    def alike(levels: Sequence[float]) -> tuple[float, float]:
        return sum(levels), 1 - sum(levels) / len(levels)

    for seed in range(3):
        found = search_schedule(alike, 6, 0.8, tolerance=0.02, seed=seed)
        assert 0.78 <= found.macs <= 0.8


def test_the_uniform_schedule_reaches_the_target() -> None:
    found = uniform_schedule(toy, 6, 0.8, protected=(0, 5))
    assert found.levels[1:5] == (found.levels[1],) * 4
    assert found.levels[0] == found.levels[5] == 0.0
    assert 0.796 <= found.macs <= 0.8
    assert uniform_schedule(toy, 6, 0.8).levels == pytest.approx([0.2] * 6, abs=0.005)
    with pytest.raises(InputError, match="no schedule came within"):
        uniform_schedule(toy, 6, 0.2, protected=(0, 5))


def test_search_refusals() -> None:
    with pytest.raises(InputError, match="nothing to search"):
        search_schedule(toy, 2, 0.8, protected=(0, 1))
    with pytest.raises(InputError, match="between 0 and 1"):
        search_schedule(toy, 6, 1.0)
    with pytest.raises(InputError, match="no schedule came within"):
        search_schedule(toy, 6, 0.1, protected=(0, 5), generations=1)


def calibration(model) -> Calibration:  # type: ignore[no-untyped-def]
    structures = []
    for number, (rattle, adsorbate) in enumerate([(0.1, "OH"), (0.05, "CO"), (0.08, "O")]):
        structures.append(as_data(slab_atoms(rattle, adsorbate), torch.float32))
        structures[-1].sid, structures[-1].fid = f"system{number}", 0
    one = Normalizer(0.0, 1.0)
    return Calibration(model, Normalizers(energy=one, forces=one), structures, batch_size=2)


@pytest.mark.slow
def test_a_schedule_on_the_network() -> None:
    model = exact_model(torch.float32, num_layers=5)
    data = calibration(model)
    objective = ScheduleObjective(model, data, StaticRouter)
    found = search_schedule(objective, 5, 0.8, population=6, generations=2, tolerance=0.03)
    assert 0.77 <= found.macs <= 0.8
    assert found.loss == pytest.approx(objective(found.levels)[0])
    router = RandomRouter(0.1, seed=4).with_levels(found.levels)
    assert isinstance(router, RandomRouter)
    assert (router.seed, router.levels) == (4, found.levels)


def test_achieved_counts_what_is_computed() -> None:
    model = exact_model(torch.float32)
    batch = Batch.from_data_list(
        [as_data(slab_atoms(0.1), torch.float32), as_data(slab_atoms(0.05), torch.float32)]
    )
    target = model.build_graph(batch).edge_index[1]
    routed = RoutedModel(model, ActiveRegion())
    with torch.no_grad():
        routed(batch)
        routed(batch)
    active = ~((batch.tags == 0) & batch.fixed)
    achieved = routed.computed_shares()
    assert achieved.atoms == pytest.approx([float(active.double().mean())] * 4)
    assert achieved.edges == pytest.approx([float(active[target].double().mean())] * 4)
    assert achieved.token_sparsity == pytest.approx(1 - float(active.double().mean()))
    atoms, edges = len(batch.pos), len(target)
    dense = count_macs(model.config, atoms, edges)
    skipped = count_macs(model.config, atoms - int(active.sum()), edges - int(active[target].sum()))
    nothing = count_macs(model.config, 0, 0)
    saved = sum(sum(block.values()) for block in skipped.blocks) - sum(
        sum(b.values()) for b in nothing.blocks
    )
    assert achieved.macs == pytest.approx(1 - saved / (dense.total - nothing.total), rel=1e-6)
    assert "% of the MACs left" in str(achieved)
    assert achieved.to_dict()["edge_sparsity"] == achieved.edge_sparsity


def test_removed_atoms_are_counted_in_the_heads_too() -> None:
    model = exact_model(torch.float32)
    batch = Batch.from_data_list([as_data(slab_atoms(0.1), torch.float32)])
    removed, context = RoutedModel(model, ActiveRegion("remove_tag0")), RoutedModel(model, ActiveRegion())
    with torch.no_grad():
        removed(batch)
        context(batch)
    assert removed.computed_shares().macs < context.computed_shares().macs < 0.8

"""Genetic search of the sparsity of every block, and what a router achieves."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from routing_helpers import as_data, exact_model, slab_atoms
from torch_geometric.data import Batch

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.errors import InputError
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.cost.operations import MacRates, count_macs
from equiformer2.pruning.routing import (
    ActiveRegion,
    AtomPruner,
    BaseRouter,
    DegreeRouter,
    DistanceRouter,
    EdgePruner,
    FTPRouter,
    RandomRouter,
    RoutedModel,
    ScheduleObjective,
    StaticRouter,
    search_schedule,
)
from equiformer2.pruning.routing.schedule_objective import Measurement
from equiformer2.pruning.routing.sparsity_schedule import uniform_schedule

WEIGHTS = (0.0, 5.0, 1.0, 0.2, 3.0, 0.0)
PARTS = 4


def toy_loss(levels: Sequence[float]) -> float:
    """Skipping hurts each block by another amount, the more the more is skipped."""
    return sum(weight * level**2 for weight, level in zip(WEIGHTS, levels, strict=True))


def toy_macs(levels: Sequence[float]) -> float:
    """Blocks cost the same."""
    return 1 - sum(levels) / len(levels)


@dataclasses.dataclass
class Toy:
    """Objective with four parts of the structures, which differ by up to a tenth; notes what is asked for.

    `foretold` is False for a router whose MACs only the network tells; there they are a tenth more.
    """

    loss: Callable[[Sequence[float]], float] = toy_loss
    foretold: bool = True
    parts: int = PARTS
    threads: int = 1

    def __post_init__(self) -> None:
        self.asked: list[tuple[tuple[float, ...], int]] = []

    def macs(self, levels: Sequence[float]) -> float | None:
        return toy_macs(levels) if self.foretold else None

    def measure(self, levels: Sequence[float], part: int) -> Measurement:
        self.asked.append((tuple(levels), part))
        macs = toy_macs(levels) if self.foretold else 1 - 0.9 * (1 - toy_macs(levels))
        share = 1 / self.parts
        loss = share * self.loss(levels) * (1 + 0.1 * np.cos(3 * part + 5 * levels[2]))
        return Measurement(float(loss), share * macs, share, 8 * share * macs)


def test_the_search_finds_the_schedule_of_the_least_loss() -> None:
    options = {"protected": (0, 5), "generations": 20, "tolerance": 0.01, "seed": 0}
    found = search_schedule(Toy(), 6, 0.8, **options)
    assert 0.79 <= found.macs <= 0.8
    assert found.levels[0] == found.levels[5] == 0.0
    # Block 3 costs least, block 1 most.
    assert found.levels[3] > found.levels[2] > found.levels[1]
    assert found.loss < 0.6 * toy_loss([0, 0.3, 0.3, 0.3, 0.3, 0])
    assert list(found.history) == sorted(found.history, reverse=True)
    assert search_schedule(Toy(), 6, 0.8, **options) == found


def test_the_first_and_the_last_block_are_part_of_the_search() -> None:
    """Skipping there costs nothing, so the search does; where it costs most, it does not."""
    found = search_schedule(Toy(), 6, 0.8, generations=20, tolerance=0.01, seed=0)
    assert min(found.levels[0], found.levels[5]) > max(found.levels[1:5])
    options = {"generations": 20, "tolerance": 0.01}
    assert found.loss < search_schedule(Toy(), 6, 0.8, protected=(0, 5), **options).loss

    def dear_ends(levels: Sequence[float]) -> float:
        return toy_loss(levels) + 100 * (levels[0] ** 2 + levels[5] ** 2)

    found = search_schedule(Toy(dear_ends), 6, 0.8, generations=1, population=4, tolerance=0.01, seed=0)
    # The schedule that leaves them alone is tried from the beginning.
    assert found.loss <= 1.1 * toy_loss([0.0, 0.32, 0.32, 0.32, 0.32, 0.0])
    assert max(found.levels[0], found.levels[5]) < 0.05


@pytest.mark.parametrize("foretold", [True, False])
def test_operations_are_no_way_to_a_better_schedule(foretold: bool) -> None:
    """All blocks alike: nothing but more operations could lower the loss."""
    for seed in range(3):
        found = search_schedule(Toy(sum, foretold), 6, 0.8, tolerance=0.02, seed=seed)
        assert 0.78 <= found.macs <= 0.8


def test_where_macs_are_foretold_the_network_sees_schedules_at_the_target_alone() -> None:
    """Beside the six in which one block skips alone, on the first part."""
    toy = Toy()
    search_schedule(toy, 6, 0.8, seed=1)
    alone = {levels for levels, _ in toy.asked if sum(level > 0 for level in levels) == 1}
    assert len(alone) == 6
    assert {part for levels, part in toy.asked if levels in alone} == {0}
    assert all(0.78 <= toy_macs(levels) <= 0.8 for levels, _ in toy.asked if levels not in alone)
    assert len(set(toy.asked)) == len(toy.asked)


def test_few_schedules_run_on_all_structures() -> None:
    toy = Toy()
    found = search_schedule(toy, 6, 0.8, seed=0)
    on_part = [sum(asked == part for _, asked in toy.asked) for part in range(PARTS)]
    assert on_part == sorted(on_part, reverse=True)
    # Half of a generation, and a quarter of it, at most; fewer where the best one is out of reach.
    assert on_part[1] <= 0.5 * on_part[0] + 1
    assert on_part[2] == on_part[3] <= 0.25 * on_part[0] + 1
    assert found.evaluations == len({levels for levels, _ in toy.asked})
    assert found.passes == pytest.approx(sum(2 * toy_macs(levels) for levels, _ in toy.asked))
    # The chosen one is among those on all.
    assert {part for levels, part in toy.asked if levels == found.levels} == set(range(PARTS))
    assert found.loss == pytest.approx(sum(Toy().measure(found.levels, part).loss for part in range(PARTS)))


def test_a_hopeless_schedule_ends_early() -> None:
    """Behind a best schedule that cannot be reached again no other one runs on all structures."""
    best = (0.0, 0.3, 0.3, 0.3, 0.3, 0.0)

    def needle(levels: Sequence[float]) -> float:
        return 1.0 if tuple(levels) == best else 2.0 + toy_loss(levels)

    toy = Toy(needle)
    found = search_schedule(toy, 6, 0.8, start=[best], population=8, generations=4)
    assert found.levels == best
    after_the_first = toy.asked[toy.asked.index((best, PARTS - 1)) :]
    beyond = {levels for levels, part in after_the_first if part == PARTS - 1}
    assert len(beyond) <= 2  # the first generation's


def test_several_threads_find_the_same_schedule() -> None:
    """As many measurements, each once."""
    alone, together = Toy(), Toy(threads=2)
    found = [search_schedule(toy, 6, 0.8, seed=3) for toy in (alone, together)]
    assert found[0] == found[1]
    assert sorted(alone.asked) == sorted(together.asked)


def test_progress_rises_to_the_end() -> None:
    seen: list[tuple[float, float]] = []
    search_schedule(Toy(), 6, 0.8, generations=3, progress=lambda *now: seen.append(now))
    shares, losses = zip(*seen, strict=True)
    assert list(shares) == sorted(shares)
    assert shares[-1] == 1.0
    assert losses[-1] == min(losses) < float("inf")


def test_the_uniform_schedule_reaches_the_target() -> None:
    toy = Toy()
    found = uniform_schedule(toy, 6, 0.8, protected=(0, 5))
    assert found.levels[1:5] == (found.levels[1],) * 4
    assert found.levels[0] == found.levels[5] == 0.0
    assert 0.796 <= found.macs <= 0.8
    assert len(toy.asked) == PARTS
    assert uniform_schedule(Toy(), 6, 0.8).levels == pytest.approx([0.2] * 6, abs=0.005)
    assert 0.78 <= uniform_schedule(Toy(foretold=False), 6, 0.8).macs <= 0.8
    with pytest.raises(InputError, match="no schedule came within"):
        uniform_schedule(Toy(), 6, 0.2, protected=(0, 5))


def test_search_refusals() -> None:
    with pytest.raises(InputError, match="nothing to search"):
        search_schedule(Toy(), 2, 0.8, protected=(0, 1))
    with pytest.raises(InputError, match="between 0 and 1"):
        search_schedule(Toy(), 6, 1.0)
    for foretold in (True, False):
        with pytest.raises(InputError, match="no schedule came within"):
            search_schedule(Toy(foretold=foretold), 6, 0.1, protected=(0, 5), generations=1)


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


ROUTERS = {
    "static": StaticRouter,
    "distance": DistanceRouter,
    "degree": DegreeRouter,
    "random": RandomRouter,
    "atom": AtomPruner,
    "edge": EdgePruner,
    "ftp": FTPRouter,
}
LEVELS = [
    [0.0, 0.4, 0.3, 0.6],
    [0.0, 0.4, 0.3, 0.2],
    [0.5, 0.4, 0.0, 0.2],
]


@pytest.fixture(scope="module")
def measured() -> tuple[EquiformerV2, Calibration]:
    model = exact_model(torch.float32)
    return model, calibration(model)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_schedule_is_measured_to_the_bit(measured, kind: str) -> None:
    """Losses with stored features, without, and of whole passes; MACs foretold and counted."""
    model, data = measured

    def make(levels: Sequence[float]) -> BaseRouter:
        return ROUTERS[kind]([level if level > 0 else None for level in levels])

    stored, forgetful = (
        ScheduleObjective(model, data, make),
        ScheduleObjective(model, data, make, prefix_bytes=0),
    )
    for levels in LEVELS:
        parts = [stored.measure(levels, part) for part in range(stored.parts)]
        others = [forgetful.measure(levels, part) for part in range(stored.parts)]
        assert [part.loss for part in parts] == [part.loss for part in others]
        routed = RoutedModel(model, make(levels))
        assert sum(part.loss for part in parts) == pytest.approx(data.loss(routed), rel=1e-12)
        macs = routed.computed_shares().macs
        assert sum(part.macs for part in parts) == pytest.approx(macs, rel=1e-12)
        assert stored.macs(levels) == (None if kind in ("atom", "edge", "ftp") else macs)
    assert sum(part.dense for part in parts) == pytest.approx(1.0)


def test_blocks_with_the_same_decisions_run_once(measured) -> None:
    model, data = measured
    objective = ScheduleObjective(model, data, StaticRouter)
    work = [sum(objective.measure(levels, part).passes for part in range(2)) for levels in LEVELS[:2]]
    macs = [objective.macs(levels) for levels in LEVELS[:2]]
    blocks = MacRates.of(model.config)
    heads = float(blocks.heads @ blocks.total.new_tensor(data.size)) / float(
        blocks.total @ blocks.total.new_tensor(data.size)
    )
    # All of the first schedule; of the second the last block and the heads.
    assert work[0] == pytest.approx(3 * macs[0], rel=0.02)
    last = 3 * heads + 3 * (macs[1] - objective.macs([0.0, 0.4, 0.3, 1.0]))
    assert work[1] == pytest.approx(last, rel=0.02)


def test_stored_features_keep_to_their_memory(measured) -> None:
    """Features used lately stay, and the others go first."""
    model, data = measured
    one = 4 * data.sizes[0][1] * 9 * model.config.sphere_channels
    objective = ScheduleObjective(model, data, StaticRouter, prefix_bytes=3 * one)
    first = objective.measure(LEVELS[0], 0).passes
    again = objective.measure(LEVELS[1], 0).passes
    assert again < first
    objective.measure(LEVELS[2], 0)  # other features before all blocks but the first
    assert objective.measure(LEVELS[1], 0).passes > again


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

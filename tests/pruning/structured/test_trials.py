"""Trials of cuts: the answers of whole passes, the winner of an exhaustive comparison, and less work."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from search_helpers import NORMALIZERS, slab, tiny_model

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.cost.operations import count_macs
from equiformer2.pruning.cost.targets import MacTarget
from equiformer2.pruning.cost.work import Work
from equiformer2.pruning.stored_passes import StoredPasses
from equiformer2.pruning.structured.apply import masked
from equiformer2.pruning.structured.candidate_cuts import DIMENSIONS, Cut, possible_cuts
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_methods import search_settings
from equiformer2.pruning.structured.search import GreedySearch
from equiformer2.pruning.structured.trials import Trials
from equiformer2.pruning.structured.unit_scores import weight_scores

METALS = ("Cu", "Pt", "Ni", "Ag")


@pytest.fixture(scope="module")
def model() -> EquiformerV2:
    return tiny_model(num_layers=3)


@pytest.fixture(scope="module")
def calibration(model: EquiformerV2) -> Calibration:
    """Four systems, a batch each."""
    return Calibration(model, NORMALIZERS, [slab(metal, metal) for metal in METALS], batch_size=1)


@pytest.fixture(scope="module")
def cut_already(model: EquiformerV2) -> PruningPlan:
    return PruningPlan.keep_all(model.config).with_block(1, heads=(1,))


@pytest.fixture(scope="module")
def cuts(model: EquiformerV2, cut_already: PruningPlan) -> list[Cut]:
    return possible_cuts(cut_already, model.config, weight_scores(model), DIMENSIONS)


def trials_of(model: EquiformerV2, calibration: Calibration, plan: PruningPlan) -> Trials:
    return Trials(model, calibration, Work(model.config, calibration.sizes), plan)


def saved(model: EquiformerV2, plan: PruningPlan, cut: Cut) -> int:
    before, after = (count_macs(model.config, 16, 96, each).total for each in (plan, cut.plan))
    return before - after


@pytest.mark.slow
def test_a_trial_has_the_errors_of_a_whole_pass(model, calibration, cut_already, cuts) -> None:
    """Cuts of every block, of the heads and of the sphere channels, within a plan that is cut already."""
    trials = trials_of(model, calibration, cut_already)
    with trials.present():
        winner, tried = trials.race(cuts, lambda cut, after, before: after, bounds=False)
    assert {cut.cut.dimension for cut in tried} == set(DIMENSIONS)
    for trial in tried:
        with masked(model, trial.cut.plan):
            whole = calibration.loss(model)
        assert trials.losses(trial)[0] == whole, trial.cut.name
    with masked(model, cut_already):
        assert trials.loss_before(range(4)) == calibration.loss(model) > 0.0
    with trials.present():
        assert trials.take(winner) == trials.losses(winner)[0]
        again = possible_cuts(winner.cut.plan, model.config, weight_scores(model), DIMENSIONS)
        _, tried = trials.race(again[::5], lambda cut, after, before: after, bounds=False)
    for trial in tried:
        with masked(model, trial.cut.plan):
            assert trials.losses(trial)[0] == calibration.loss(model), trial.cut.name
    assert calibration.loss(model) == 0.0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("measure", ["loss", "damage per operation"])
def test_bounds_never_end_the_winner(model, calibration, cut_already, cuts, measure: str) -> None:
    """On random choices of cuts, in random order."""

    def value(cut: Cut, after: float, before: float) -> float:
        return after if measure == "loss" else (after**2 - before**2) / saved(model, cut_already, cut)

    def race(chosen: Sequence[Cut], bounds: bool) -> tuple[str, float]:
        trials = trials_of(model, calibration, cut_already)
        with trials.present():
            winner, _ = trials.race(chosen, value, bounds=bounds)
        assert sorted(winner.errors) == list(range(4))
        return winner.cut.name, trials.work.passes

    rng = np.random.default_rng(0)
    work = {True: 0.0, False: 0.0}
    for _ in range(3):
        chosen = [cuts[index] for index in rng.choice(len(cuts), 5, replace=False)]
        found = {bounds: race(chosen, bounds) for bounds in (True, False)}
        assert found[True][0] == found[False][0]
        for bounds, (_, passes) in found.items():
            work[bounds] += passes
    assert work[True] < work[False]


def test_halving_tries_all_on_few_and_few_on_all(model, calibration, cut_already, cuts) -> None:
    trials = trials_of(model, calibration, cut_already)
    with trials.present():
        winner, tried = trials.race(cuts[:6], lambda cut, after, before: after, first=1, bounds=False)
        assert sorted(len(trial.errors) for trial in tried) == [1] * 3 + [2] * 1 + [4] * 2
        trials.take(winner)
    assert len(winner.errors) == 4
    assert trials.plan == winner.cut.plan


def test_work_counts_what_is_run(model, calibration, cut_already) -> None:
    """A cut of the last block runs it and the heads alone, for every structure."""
    macs = count_macs(model.config, *calibration.size)
    last = cut_already.with_block(2, feed_forward=False)
    trials = trials_of(model, calibration, cut_already)
    with trials.present():
        trials.race([Cut("block", 2, "feed_forward", last, None)], lambda cut, after, before: after)
    heads = macs.energy_head + sum(macs.force_head.values())
    run = macs.total + sum(macs.blocks[2].values()) + heads
    assert trials.work.passes == pytest.approx(4 * run / macs.total, rel=3e-3)


def test_features_are_kept_as_far_as_the_memory_goes() -> None:
    config = ModelConfig(num_layers=8, lmax=4, mmax=2, sphere_channels=128, num_distance_basis=512)
    sizes = [(4, 200, 4000)] * 8
    assert StoredPasses(config, sizes).blocks == list(range(9))
    edges, features = 4 * 32_000 * (116 + 512), 2 * 4 * 1600 * 25 * 128
    for room, expected in ((9, 9), (8.9, 5), (3, 3), (1, 1), (0.9, 0)):
        blocks = StoredPasses(config, sizes, int(edges + room * features)).blocks
        assert len(blocks) == expected
        assert not blocks or blocks[-1] == 8


@pytest.mark.one_in(3)
@pytest.mark.parametrize("room", [0.0, 1.0, 2.5])
def test_less_memory_changes_no_loss(model, calibration, cut_already, cuts, room: float) -> None:
    trials = trials_of(model, calibration, cut_already)
    size = 2 * 4 * 16 * 9 * 8
    edges = 4 * calibration.size[1] * (35 + 1 + model.config.num_distance_basis)
    trials._passes = StoredPasses(model.config, calibration.sizes, int(edges + room * size))
    assert len(trials._passes.blocks) == int(room)
    with trials.present():
        winner, tried = trials.race(cuts[::4], lambda cut, after, before: after, bounds=False)
        trials.take(winner)
    for trial in tried:
        with masked(model, trial.cut.plan):
            assert trials.losses(trial)[0] == calibration.loss(model)


@pytest.mark.slow
def test_without_noise_halving_finds_the_plan_of_the_exhaustive_search(model) -> None:
    """All systems are alike, so that few say what all say."""
    copies = [slab(f"{number}") for number in range(4)]
    calibration = Calibration(model, NORMALIZERS, copies, batch_size=1)
    cost = MacTarget(model.config, 0.5, atoms=16, edges=96).fraction_of
    settings = dataclasses.replace(search_settings("multi", tries=4), refresh=0.0, least=0.0, first=1)
    found = [
        GreedySearch(model, NORMALIZERS, calibration, cost, 0.85, each, progress=False)
        for each in (settings, settings.exhaustive())
    ]
    plans = [search.run().plan for search in found]
    assert plans[0] == plans[1]
    assert found[0].work.passes < 0.8 * found[1].work.passes

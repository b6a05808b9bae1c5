"""Greedy searches and the baselines that they must beat."""

import json
from pathlib import Path

import numpy as np
import pytest
from search_helpers import NORMALIZERS, slabs, tiny_model

from equiformer2.errors import InputError
from equiformer2.model import ModelConfig
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.cost.targets import MacTarget
from equiformer2.pruning.structured.apply import masked
from equiformer2.pruning.structured.baselines import magnitude_plan, random_plan, uniform_plan
from equiformer2.pruning.structured.candidate_cuts import DIMENSIONS, possible_cuts, without_least
from equiformer2.pruning.structured.importance import gradient_importances, probe
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_methods import search_settings
from equiformer2.pruning.structured.search import GreedySearch, SearchSettings, Stage
from equiformer2.pruning.structured.unit_scores import weight_scores


class KilledError(Exception):
    pass


class DyingCalibration(Calibration):
    """Raises after some batches that a search asks for."""

    batches_run = 0
    batches_left = 0

    def errors(self, index, model, **given):
        self.batches_run += 1
        if self.batches_run > self.batches_left:
            raise KilledError
        return super().errors(index, model, **given)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def calibration(model):
    return Calibration(model, NORMALIZERS, slabs())


def fraction(config: ModelConfig):
    return MacTarget(config, 0.5, atoms=16, edges=96).fraction_of


def search(model, calibration, target=0.7, method="multi", **options) -> GreedySearch:
    importance = options.pop("importance", "michel")
    settings = search_settings(method, tries=3, seed=options.pop("seed", 0), importance=importance)
    return GreedySearch(
        model, NORMALIZERS, calibration, fraction(model.config), target, settings, progress=False, **options
    )


def test_cuts_shrink_and_follow_the_scores(model) -> None:
    dense = PruningPlan.keep_all(model.config)
    scores = weight_scores(model)
    cost = fraction(model.config)
    cuts = possible_cuts(dense, model.config, scores, DIMENSIONS)
    assert {cut.dimension for cut in cuts} == set(DIMENSIONS)
    assert len({cut.name for cut in cuts}) == len(cuts)
    for cut in cuts:
        assert cut.plan.checked(model.config) == cut.plan or cut.dimension == "order"
        assert cost(cut.plan) < 1.0, cut.name
    heads = next(cut for cut in cuts if cut.name == "head/0/heads")
    assert heads.plan.blocks[0].heads == (int(np.argmax(scores[0, "heads"])),)
    assert heads.score == pytest.approx(scores[0, "heads"].min())


def test_no_unit_is_the_last_to_go() -> None:
    assert without_least((3,), np.zeros(4), 1) == (None, 0.0)
    assert without_least((0, 2, 3), np.array([1.0, 0.0, 1.0, 0.5]), 1) == ((0, 2), 0.5)


def test_cuts_end_where_nothing_is_left(model) -> None:
    plan, scores = PruningPlan.keep_all(model.config), weight_scores(model)
    for _ in range(500):
        cuts = possible_cuts(plan, model.config, scores, DIMENSIONS[1:])
        if not cuts:
            break
        plan = cuts[-1].plan.checked(model.config)
    after = plan.applied_to(model.config)
    assert not cuts
    assert after.block(0).attn_hidden_channels == after.block(0).num_heads == after.sphere_channels == 1
    assert (after.block(0).lmax, after.block(0).mmax) == (1, 0)


@pytest.fixture(scope="module")
def multi(model, calibration):
    """State of the default search at its end."""
    return search(model, calibration).run()


@pytest.mark.parametrize("method", ["multi", pytest.param("multi_staged", marks=pytest.mark.slow), "block"])
def test_a_search_reaches_its_target_and_knows_its_loss(model, calibration, multi, method) -> None:
    found = multi if method == "multi" else search(model, calibration, method=method).run()
    cost = fraction(model.config)
    assert found.done
    assert cost(found.plan) <= 0.7
    if method != "block":
        assert cost(found.plan) > 0.7 - 0.03
    assert [step.cost for step in found.steps] == sorted((step.cost for step in found.steps), reverse=True)
    with masked(model, found.plan):
        assert calibration.loss(model) == pytest.approx(found.loss)
    assert calibration.loss(model) == 0.0


def test_a_search_beats_random_and_magnitude_cuts_at_equal_cost(model, calibration, multi) -> None:
    cost = fraction(model.config)

    def loss(plan: PruningPlan) -> float:
        assert 0.7 >= cost(plan) > 0.6
        with masked(model, plan):
            return calibration.loss(model)

    rivals = [random_plan(model, cost, 0.7, seed) for seed in range(3)]
    rivals += [magnitude_plan(model, cost, 0.7), uniform_plan(model, cost, 0.7)]
    assert multi.loss < min(loss(plan) for plan in rivals)


@pytest.mark.slow
def test_a_killed_search_continues_to_the_same_plan(model, calibration, tmp_path) -> None:
    whole = search(model, calibration).run()
    path = tmp_path / "state.json"
    for batches in (29, 12):  # killed twice, in the middle of a step
        dying = DyingCalibration(model, NORMALIZERS, slabs())
        dying.batches_left = batches
        with pytest.raises(KilledError):
            search(model, dying, state_path=path).run()
    assert json.loads(path.read_text())["steps"]
    continued = search(model, calibration, state_path=path).run()
    assert continued.plan == whole.plan
    # What was lost in the middle of a step is run again.
    assert [step.cut for step in continued.steps] == [step.cut for step in whole.steps]
    assert [step.loss for step in continued.steps] == [step.loss for step in whole.steps]
    assert continued.passes > whole.passes
    assert search(model, calibration, state_path=path).run().plan == whole.plan


def test_another_search_does_not_continue_a_state(model, calibration, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    search(model, calibration, target=0.95, state_path=path).run()
    with pytest.raises(InputError, match=r"target was 0\.95 and is 0\.9 now"):
        search(model, calibration, target=0.9, state_path=path)
    with pytest.raises(InputError, match="model was"):
        search(tiny_model(seed=5), calibration, target=0.95, state_path=path)
    with pytest.raises(InputError, match="wanted was"):
        search(model, calibration, target=0.95, state_path=path, shares={"parameters": 0.95})
    path.write_text(path.read_text().replace('"version": 2,\n  "fing', '"version": 1,\n  "fing'))
    with pytest.raises(InputError, match="another version of the package has written it"):
        search(model, calibration, target=0.95, state_path=path)
    path.write_text("{}")
    with pytest.raises(InputError, match="is no state"):
        search(model, calibration, target=0.95, state_path=path)


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["michel", "taylor"])
def test_units_are_ranked_by_what_was_asked_for(importance, model, calibration) -> None:
    looking = search(model, calibration, importance=importance)
    scores = looking.scores()
    chosen = [calibration.structures[i] for i in range(len(calibration.structures))]
    objective = probe(NORMALIZERS, calibration.force_weight, int(_after_choice(len(chosen))))
    expected = gradient_importances(model, chosen, objective)[importance]
    assert np.allclose(scores[0, "heads"], expected.heads[0].double().numpy())
    assert np.allclose(scores[0, "attn_hidden_channels"], expected.attn_hidden[0].double().numpy())
    plan = looking.run().plan
    assert fraction(model.config)(plan) <= 0.7


def _after_choice(count: int) -> int:
    """The seed of the random directions of a search's first step."""
    rng = np.random.default_rng((0, 0))
    rng.choice(count, count, replace=False)
    return int(rng.integers(2**31))


def test_the_two_rankings_are_two(model, calibration, tmp_path: Path) -> None:
    scores = [search(model, calibration, importance=name).scores() for name in ("michel", "taylor")]
    assert not np.allclose(scores[0][0, "attn_hidden_channels"], scores[1][0, "attn_hidden_channels"])
    path = tmp_path / "state.json"
    search(model, calibration, target=0.95, state_path=path).run()
    with pytest.raises(InputError, match="settings was"):
        search(model, calibration, target=0.95, state_path=path, importance="taylor")
    with pytest.raises(InputError, match="the importance 'best' is not known"):
        search(model, calibration, importance="best")


@pytest.mark.slow
def test_a_search_can_go_on_from_a_plan(model, calibration) -> None:
    start = PruningPlan.keep_all(model.config).with_block(0, heads=(1,))
    found = search(model, calibration, target=0.7, start=start).run()
    assert found.plan.blocks[0].heads == (1,) or not found.plan.blocks[0].attention


@pytest.mark.slow
def test_an_impossible_target_is_an_error(model, calibration) -> None:
    with pytest.raises(InputError, match="cannot be reached"):
        search(model, calibration, target=0.01, method="block").run()
    cost = fraction(model.config)
    with pytest.raises(InputError, match="cannot be reached"):
        random_plan(model, cost, 1e-4, seed=0)
    with pytest.raises(InputError, match="cannot be reached"):
        uniform_plan(model, cost, 1e-4)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="rising"):
        SearchSettings((Stage(("block",), 0.5),))
    with pytest.raises(InputError, match="tries"):
        SearchSettings((Stage(("block",)),), tries=0)


def test_random_plans_differ_by_seed_only(model) -> None:
    cost = fraction(model.config)
    assert random_plan(model, cost, 0.7, seed=1) == random_plan(model, cost, 0.7, seed=1)
    assert random_plan(model, cost, 0.7, seed=1) != random_plan(model, cost, 0.7, seed=2)


def test_uniform_plans_cut_all_blocks_alike(model) -> None:
    after = uniform_plan(model, fraction(model.config), 0.7).applied_to(model.config)
    assert after.block(0) == after.block(1)
    assert after.block(0).attn_hidden_channels == after.force_block.attn_hidden_channels < 8

"""Greedy search for a plan: the one loop behind MultiPruner and BlockPruner.

Every step lists the possible cuts, orders them by what they are expected to damage per saved cost, tries the
most promising ones with masks on the calibration structures (see `trials`), and makes the cut that did least
damage per saved cost. Nothing is trained.

    damage = L(after)² - L(before)²

Squares, because the errors of different cuts are nearly independent and then add up in squares. What a cut is
expected to damage is what it did when it was last tried at this place, else the squared importance of its
units times a factor per dimension, which is fitted to the trials so far. Cuts with neither (degrees and
orders) are tried at once.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Normalizers
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.cost.work import GRADIENT, Work
from equiformer2.pruning.fingerprints import fingerprint_of_structures
from equiformer2.pruning.structured.apply import masked
from equiformer2.pruning.structured.candidate_cuts import Cut, possible_cuts
from equiformer2.pruning.structured.importance import gradient_importance, probe
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.search_state import SearchState, Step
from equiformer2.pruning.structured.trials import Trial, Trials
from equiformer2.pruning.structured.unit_scores import NETWORK, UnitScores, gradient_scores

log = logging.getLogger("equiformer2")

Cost = Callable[[PruningPlan], float]
IMPORTANCES = ("michel", "taylor")
_KEPT_RATIOS = 20
_WORST = 1e30  # JSON holds no infinity
_RECENT = 10
"""Steps from whose work the work left is estimated."""


@dataclass(frozen=True)
class Stage:
    """Part of a search: the kinds of cuts and the cost to come down to.

    Attributes:
        dimensions: kinds of cuts, of `candidate_cuts.DIMENSIONS`.
        share: share of the whole cost to remove that is gone when the stage ends; 1 in the last.
    """

    dimensions: tuple[str, ...]
    share: float = 1.0


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a greedy search.

    Attributes:
        stages: stages of the search, one after the other.
        tries: number of cuts with an expectation that are tried per step.
        per_cost: choose by damage per saved cost; else by the loss alone.
        tolerance: share of the dense cost by which a plan may end below the target, as long as some cut does
            not go further.
        first: number of structures on which all cuts of a step are tried, others in every step; the better
            half goes on to twice as many, and so on, and the cut that is made runs on all. None tries every
            cut on all structures.
        bounds: end the trial of a cut once it cannot be the best any more. It then has no exact damage.
        least: share of the dense cost that a step saves at least: the winner is made together with the next
            best cuts of other blocks. They would mostly win the next steps, and without it a network of many
            blocks would take many.
        refresh: share of the dense cost by which the cost falls until importance is computed anew.
        importance: importance of units by which cuts are ranked before any is tried: `michel` or `taylor`
            (see `importance`).
        importance_structures: number of structures that gradients are taken on, drawn anew every time.
        seed: random seed of that draw and of the gradients' directions.

    Raises:
        InputError: a setting out of its range.
    """

    stages: tuple[Stage, ...]
    tries: int = 8
    per_cost: bool = True
    tolerance: float = 0.01
    first: int | None = 4
    bounds: bool = True
    least: float = 0.015
    refresh: float = 0.03
    importance: Literal["michel", "taylor"] = "michel"
    importance_structures: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        shares = [stage.share for stage in self.stages]
        if not shares or shares != sorted(shares) or shares[-1] != 1.0 or not shares[0] > 0:
            raise InputError(f"the stages of a search end at shares {shares}: give rising ones up to 1")
        if self.importance not in IMPORTANCES:
            raise InputError(
                f"the importance {self.importance!r} is not known: use one of {', '.join(IMPORTANCES)}"
            )
        for name in ("tries", "importance_structures", "first"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give at least 1")
        for name in ("tolerance", "refresh", "least"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a share of the dense cost")

    def exhaustive(self) -> "SearchSettings":
        """Return the same search without savings: every cut on all structures, one cut and ranking per step.

        It takes several times the work, and shows what the savings cost in accuracy (studies/search_cost.py).
        """
        return dataclasses.replace(self, first=None, bounds=False, refresh=0.0, least=0.0)


class GreedySearch:
    """Greedy search for a plan: MultiPruner (arXiv 2501.09949) and BlockPruner (arXiv 2406.10594).

    Args:
        model: dense network; unchanged afterwards.
        normalizers: units of the network's outputs.
        calibration: structures with the dense answers.
        cost: cost of a plan.
        target: cost to come down to, in the same unit.
        settings: settings of the search.
        state_path: file that the state is continued from, if it exists, and written to; None keeps none.
        start: cuts made already; `calibration` holds the answers of the network cut so.
        progress: show a progress bar.
        shares: quantities that `cost` counts and the share of each that is to stay; a stored search for
            other shares is refused.

    Attributes:
        state: cuts made so far.
        dense_cost: cost of the plan that keeps everything.
        start_cost: cost of `start`.

    Raises:
        InputError: a state of another search, or a target that the dimensions cannot reach.
    """

    def __init__(
        self,
        model: EquiformerV2,
        normalizers: Normalizers,
        calibration: Calibration,
        cost: Cost,
        target: float,
        settings: SearchSettings,
        state_path: AnyPath | None = None,
        start: PruningPlan | None = None,
        progress: bool = True,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        state_path = None if state_path is None else Path(state_path)
        self.model, self.normalizers, self.calibration = model, normalizers, calibration
        self.settings, self.state_path, self.progress = settings, state_path, progress
        self._cost, self._costs = cost, dict[PruningPlan, float]()
        self._shares = dict(shares or {})
        dense = PruningPlan.keep_all(model.config)
        self.dense_cost, self.start_cost = self.cost(dense), self.cost(start or dense)
        removed = self.start_cost - target
        self._budgets = [self.start_cost - stage.share * removed for stage in settings.stages]
        self.state = SearchState(self._fingerprint(target, start or dense), start or dense)
        if state_path is not None and state_path.exists():
            self.state = SearchState.load(state_path, self.state.fingerprint)
            log.info(f"continuing the search in {state_path} after {len(self.state.steps)} cuts")
        self.work = Work(model.config, calibration.sizes, self.state.passes)
        self._trials = Trials(model, calibration, self.work, self.state.plan)
        self._scores: tuple[int, UnitScores] | None = None

    def cost(self, plan: PruningPlan) -> float:
        """Return the cost of `plan`, which is computed once."""
        if plan not in self._costs:
            self._costs[plan] = self._cost(plan)
        return self._costs[plan]

    def run(self) -> SearchState:
        """Search to the end.

        Returns:
            The state, whose `plan` is the result.

        Raises:
            InputError: the dimensions cannot reach the target.
        """
        passes = round(self.work.passes)
        with tqdm(
            desc="pruning", unit="passes", initial=passes, smoothing=0.05, disable=not self.progress
        ) as bar:
            self.work.show = lambda _: bar.update(round(self.work.passes) - bar.n)
            while not self.state.done:
                self._show(bar)
                self._step()
                if self.state_path is not None:
                    self.state.save(self.state_path)
        return self.state

    def _step(self) -> None:
        state, stage = self.state, self.settings.stages[self.state.stage]
        budget, last = self._budgets[state.stage], state.stage == len(self._budgets) - 1
        if self.cost(state.plan) <= budget:
            state.stage, state.done = (state.stage, True) if last else (state.stage + 1, False)
            return
        cuts = self._affordable(possible_cuts(state.plan, self.model.config, self.scores(), stage.dimensions))
        allowed = [cut for cut in cuts if self.cost(cut.plan) >= budget - self._slack]
        if not allowed and not last:
            state.stage += 1
            return
        promising = self._promising(allowed or cuts)
        if not promising:
            raise InputError(
                f"the target cannot be reached: cuts of {', '.join(stage.dimensions)} end at "
                f"{self.cost(state.plan) / self.dense_cost:.1%} of the dense cost; aim higher or allow more "
                "dimensions"
            )
        # Of those that reach the target, the one with the least loss.
        final = [cut for cut in promising if self.cost(cut.plan) <= budget] if last else []
        with self._trials.present():
            best, trials = self._trials.race(
                final or promising,
                self._loss_alone if final else self._damage_per_cost,
                self.settings.first,
                self.settings.bounds,
                turn=len(state.steps),
            )
            tried = [trial for trial in trials if trial.errors]
            for trial in tried:
                self._learn(trial)
            made = [best.cut] if final else self._together(best, tried, budget)
            joint = functools.reduce(Cut.joined, made)
            loss = self._trials.take(best if len(made) == 1 else Trial(joint))
        self._take(joint, loss, len(tried))
        for cut in made:  # the next cut at this place is another one
            state.damages.pop(cut.name, None)

    def _together(self, best: Trial, tried: Sequence[Trial], budget: float) -> list[Cut]:
        """Choose cuts of other places that are made with the winner, so that the step saves enough."""
        made, enough = [best.cut], self.cost(self.state.plan) - self.settings.least * self.dense_cost

        def rank(trial: Trial) -> tuple[int, float]:
            return -len(trial.errors), self._damage_per_cost(trial.cut, *self._trials.losses(trial))

        for trial in sorted(tried, key=rank)[: (len(tried) + 1) // 2]:
            places, joint = [cut.site for cut in made], functools.reduce(Cut.joined, made)
            if joint.site == NETWORK or self.cost(joint.plan) <= enough:
                break
            if trial.cut.site in (*places, NETWORK):
                continue
            # The last step is a single cut: of those that reach the target, the best.
            if self.cost(joint.joined(trial.cut).plan) > budget:
                made.append(trial.cut)
        return made

    @property
    def _slack(self) -> float:
        return self.settings.tolerance * self.dense_cost

    def _affordable(self, cuts: Sequence[Cut]) -> list[Cut]:
        now = self.cost(self.state.plan)
        return [cut for cut in cuts if self.cost(cut.plan) < now]

    def scores(self) -> UnitScores:
        """Importance of all units by gradients, else by weights, in the network as it was cut lately."""
        settings, state = self.settings, self.state
        old = state.ranked_plan
        if old is None or self.cost(old) - self.cost(state.plan) >= settings.refresh * self.dense_cost:
            state.ranked, state.ranked_plan = len(state.steps), state.plan
        if self._scores is None or self._scores[0] != state.ranked:
            assert state.ranked_plan is not None
            rng = np.random.default_rng((settings.seed, state.ranked))
            count = min(settings.importance_structures, len(self.calibration.structures))
            chosen = rng.choice(len(self.calibration.structures), count, replace=False)
            objective = probe(self.normalizers, self.calibration.force_weight, int(rng.integers(2**31)))
            with masked(self.model, state.ranked_plan):
                importance = gradient_importance(
                    self.model,
                    [self.calibration.structures[i] for i in sorted(chosen.tolist())],
                    objective,
                    settings.importance,
                )
            self._scores = state.ranked, gradient_scores(self.model, importance)
            self.work.add(GRADIENT * count)
        return self._scores[1]

    def _expected(self, cut: Cut) -> float | None:
        """Damage that `cut` is expected to do, eV²."""
        if cut.name in self.state.damages:
            return self.state.damages[cut.name]
        if cut.score is None:
            return None
        ratios = self.state.ratios.get(cut.dimension, [1.0])
        return float(np.median(ratios) * cut.score) ** 2

    def _value(self, cut: Cut, damage: float) -> float:
        return (
            damage / (self.cost(self.state.plan) - self.cost(cut.plan)) if self.settings.per_cost else damage
        )

    def _promising(self, cuts: Sequence[Cut]) -> list[Cut]:
        expected = [(cut, self._expected(cut)) for cut in cuts]
        unknown = [cut for cut, damage in expected if damage is None]
        known = [(self._value(cut, damage), index, cut) for index, (cut, damage) in enumerate(expected)
                 if damage is not None]  # fmt: skip
        return unknown + [
            cut for _, _, cut in sorted(known, key=lambda item: item[:2])[: self.settings.tries]
        ]

    @staticmethod
    def _loss_alone(cut: Cut, after: float, before: float) -> float:
        return after

    def _damage_per_cost(self, cut: Cut, after: float, before: float) -> float:
        return self._value(cut, min(after**2 - before**2, _WORST))

    def _learn(self, trial: Trial) -> None:
        """Remember the damage of a trial for the next steps."""
        after, before = self._trials.losses(trial)
        damage, cut = min(after**2 - before**2, _WORST), trial.cut
        self.state.damages[cut.name] = damage
        if cut.score:
            ratios = self.state.ratios.setdefault(cut.dimension, [])
            ratios.append(max(damage, 0.0) ** 0.5 / cut.score)
            del ratios[:-_KEPT_RATIOS]

    def _take(self, cut: Cut, loss: float, tried: int) -> None:
        state = self.state
        state.plan, state.loss = cut.plan, min(loss, _WORST)
        state.steps.append(Step(cut.name, self.cost(state.plan), state.loss, tried, self.work.passes))

    def _show(self, bar: "tqdm[None]") -> None:
        """Estimate the work left from that of the last steps and from what they saved."""
        cost, steps = self.cost(self.state.plan), self.state.steps
        recent = steps[-_RECENT:]
        if recent:
            earlier = steps[-_RECENT - 1] if len(steps) > _RECENT else None
            saved = (self.start_cost if earlier is None else earlier.cost) - cost
            spent = self.work.passes - (0.0 if earlier is None else earlier.passes)
            bar.total = round(self.work.passes + max(0.0, cost - self._budgets[-1]) * spent / saved)
        bar.set_postfix(cost=f"{cost / self.dense_cost:.1%}", loss=f"{self.state.loss:.4f}")

    def _fingerprint(self, target: float, start: PruningPlan) -> dict[str, Any]:
        return {
            "target": target,
            "wanted": self._shares,  # the key of files that exist
            "start": start.to_dict(),
            "dense_cost": self.dense_cost,
            "settings": asdict(self.settings),
            "force_weight": self.calibration.force_weight,
            "calibration": fingerprint_of_structures(self.calibration.structures),
            "model": fingerprint_of_weights(self.model),
        }

"""Greedy search for a plan: the one loop behind MultiPruner and BlockPruner.

Every step lists the possible cuts, orders them by what they are expected to damage per saved cost, tries the
most promising ones with masks on the calibration structures, and makes the cut that did least damage per
saved cost. Nothing is trained.

    damage = L(after)² - L(before)²

Squares, because the errors of different cuts are nearly independent and then add up in squares. What a cut is
expected to damage is what it did when it was last tried at this place, else the squared importance of its
units times a factor per dimension, which is fitted to the trials so far. Cuts with neither (degrees and
orders) are tried at once.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Normalizers
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.fingerprints import fingerprint_of_structures, fingerprint_of_weights
from equiformer2.pruning.structured.apply import masked
from equiformer2.pruning.structured.candidate_cuts import Cut, possible_cuts
from equiformer2.pruning.structured.importance import gradient_importance, probe
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.unit_scores import UnitScores, gradient_scores
from equiformer2.values import Items, Number, Optional, Rule, Switch, Whole, mapping

log = logging.getLogger("equiformer2")

Cost = Callable[[PruningPlan], float]
IMPORTANCES = ("michel", "taylor")
_FORMAT = "equiformer2.pruning_search"
_VERSION = 1
_NUMBER = Number(-1e300, 1e300)
_KEPT_RATIOS = 20
_WORST = 1e30  # JSON holds no infinity


@dataclass(frozen=True)
class Step:
    """One cut that was made.

    Attributes:
        cut: name of the cut.
        cost: cost of the plan afterwards, in the unit of the target.
        loss: loss of the plan afterwards on the calibration structures, eV; None where nothing was tried.
        tried: number of cuts that were tried on the calibration structures.
    """

    cut: str
    cost: float
    loss: float | None
    tried: int

    @staticmethod
    def read(value: Any, name: str) -> "Step":
        """Check a stored step; a `values.Rule`."""
        if set(mapping(value, name)) != {"cut", "cost", "loss", "tried"} or not isinstance(value["cut"], str):
            raise InputError(f"{name} must hold cut (a text), cost, loss and tried")
        return Step(
            value["cut"],
            _NUMBER.read(value["cost"], f"{name}.cost"),
            Optional(_NUMBER).read(value["loss"], f"{name}.loss"),
            Whole(0, 2**31).read(value["tried"], f"{name}.tried"),
        )


@dataclass
class SearchState:
    """State of a search between two steps.

    Attributes:
        fingerprint: everything that the search depends on; a state of another search is refused.
        plan: cuts made so far.
        loss: loss of `plan`, eV.
        steps: the cuts one by one.
        damages: name of a cut -> its damage when it was last tried, eV².
        ratios: dimension -> root of the damage over the score of the latest trials.
        stage: number of the present stage.
        done: True once the search has ended.
    """

    fingerprint: dict[str, Any]
    plan: PruningPlan
    loss: float = 0.0
    steps: list[Step] = field(default_factory=list)
    damages: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    stage: int = 0
    done: bool = False

    def save(self, path: Path) -> None:
        """Write the state as JSON, atomically."""
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "plan": self.plan.to_dict(),
            "loss": self.loss,
            "steps": [asdict(step) for step in self.steps],
            "damages": self.damages,
            "ratios": self.ratios,
            "stage": self.stage,
            "done": self.done,
        }
        write_json(path, values, make_folder=True)

    @classmethod
    def load(cls, path: Path, fingerprint: dict[str, Any]) -> "SearchState":
        """Read a file of `save` for a search of this `fingerprint`.

        Args:
            path: file to read.
            fingerprint: everything that the present search depends on.

        Returns:
            The stored state.

        Raises:
            InputError: the file is no such state, or one of another search; the difference is named.
        """

        def named(values: Any, rule: Rule, name: str) -> dict[str, Any]:
            return {key: rule.read(value, f"{name}.{key}") for key, value in mapping(values, name).items()}

        try:
            values = read_json(path)
            if values.get("format") != _FORMAT or values.get("version") != _VERSION:
                raise InputError("its format is another one")
            state = cls(
                fingerprint=dict(mapping(values.get("fingerprint"), "fingerprint")),
                plan=PruningPlan.from_dict(values.get("plan"), "plan"),
                loss=_NUMBER.read(values.get("loss"), "loss"),
                steps=Items(Step).read(values.get("steps"), "steps"),
                damages=named(values.get("damages"), _NUMBER, "damages"),
                ratios=named(values.get("ratios"), Items(_NUMBER), "ratios"),
                stage=Whole(0, 1000).read(values.get("stage"), "stage"),
                done=Switch().read(values.get("done"), "done"),
            )
        except InputError as error:
            raise InputError(
                f"{path} is no state of a pruning search ({error}): give another file or remove it"
            ) from error
        # Through JSON, because tuples come back as lists.
        present = json.loads(json.dumps(fingerprint))
        for key in sorted({*present, *state.fingerprint}):
            if present.get(key) != state.fingerprint.get(key):
                raise InputError(
                    f"{path} is the state of another search: {key} was {state.fingerprint.get(key)!r} and is "
                    f"{present.get(key)!r} now; give another file or remove it"
                )
        return state


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
        importance: importance of units by which cuts are ranked before any is tried: `michel` or `taylor`
            (see `importance`).
        importance_structures: number of structures that gradients are taken on, drawn anew for every step.
        seed: random seed of that draw and of the gradients' directions.

    Raises:
        InputError: a setting out of its range.
    """

    stages: tuple[Stage, ...]
    tries: int = 8
    per_cost: bool = True
    tolerance: float = 0.01
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
        for name in ("tries", "importance_structures"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give at least 1")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance}: give a share of the dense cost")


@dataclass(frozen=True)
class Trial:
    """Cut that was tried on the calibration structures.

    Attributes:
        cut: the cut.
        loss: loss afterwards, eV.
        damage: L(after)² - L(before)², eV².
    """

    cut: Cut
    loss: float
    damage: float


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
        with tqdm(total=100, desc="pruning", unit="%", disable=not self.progress) as bar:
            self._show(bar)
            while not self.state.done:
                self._step()
                if self.state_path is not None:
                    self.state.save(self.state_path)
                self._show(bar)
        return self.state

    def _step(self) -> None:
        state, stage = self.state, self.settings.stages[self.state.stage]
        budget, last = self._budgets[state.stage], state.stage == len(self._budgets) - 1
        if self.cost(state.plan) <= budget:
            state.stage, state.done = (state.stage, True) if last else (state.stage + 1, False)
            return
        cuts = self._affordable(
            possible_cuts(state.plan, self.model.config, self._scores(), stage.dimensions)
        )
        allowed = [cut for cut in cuts if self.cost(cut.plan) >= budget - self._slack]
        if not allowed and not last:
            state.stage += 1
            return
        trials = [self._try(cut) for cut in self._promising(allowed or cuts)]
        if not trials:
            raise InputError(
                f"the target cannot be reached: cuts of {', '.join(stage.dimensions)} end at "
                f"{self.cost(state.plan) / self.dense_cost:.1%} of the dense cost; aim higher or allow more "
                "dimensions"
            )
        self._take(self._best(trials, budget), len(trials))

    @property
    def _slack(self) -> float:
        return self.settings.tolerance * self.dense_cost

    def _affordable(self, cuts: Sequence[Cut]) -> list[Cut]:
        now = self.cost(self.state.plan)
        return [cut for cut in cuts if self.cost(cut.plan) < now]

    def _scores(self) -> UnitScores:
        """Importance of all units: by gradients in the network as it is cut now, else by weights."""
        settings, step = self.settings, len(self.state.steps)
        rng = np.random.default_rng((settings.seed, step))
        count = min(settings.importance_structures, len(self.calibration.structures))
        chosen = rng.choice(len(self.calibration.structures), count, replace=False)
        objective = probe(self.normalizers, self.calibration.force_weight, int(rng.integers(2**31)))
        with masked(self.model, self.state.plan):
            importance = gradient_importance(
                self.model,
                [self.calibration.structures[i] for i in sorted(chosen.tolist())],
                objective,
                settings.importance,
            )
        return gradient_scores(self.model, importance)

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

    def _try(self, cut: Cut) -> Trial:
        with masked(self.model, cut.plan):
            loss = self.calibration.loss(self.model)
        damage = min(loss**2 - self.state.loss**2, _WORST)
        self.state.damages[cut.name] = damage
        if cut.score:
            ratios = self.state.ratios.setdefault(cut.dimension, [])
            ratios.append(max(damage, 0.0) ** 0.5 / cut.score)
            del ratios[:-_KEPT_RATIOS]
        return Trial(cut, loss, damage)

    def _best(self, trials: Sequence[Trial], budget: float) -> Trial:
        """The least damage per saved cost; of those that reach the target, the least loss."""
        final = [trial for trial in trials if self.cost(trial.cut.plan) <= budget]
        if final and self.state.stage == len(self._budgets) - 1:
            return min(final, key=lambda trial: trial.loss)
        return min(trials, key=lambda trial: self._value(trial.cut, trial.damage))

    def _take(self, trial: Trial, tried: int) -> None:
        state = self.state
        state.plan, state.loss = trial.cut.plan, min(trial.loss, _WORST)
        # The next cut at this place is another one.
        state.damages.pop(trial.cut.name, None)
        state.steps.append(Step(trial.cut.name, self.cost(state.plan), state.loss, tried))

    def _show(self, bar: "tqdm[None]") -> None:
        removed = self.start_cost - self.cost(self.state.plan)
        surplus = self.start_cost - self._budgets[-1]
        bar.n = min(100, round(100 * removed / surplus)) if surplus > 0 else 100
        bar.set_postfix(
            cost=f"{self.cost(self.state.plan) / self.dense_cost:.1%}", loss=f"{self.state.loss:.4f}"
        )

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

"""Bayesian search for the precisions of a network's parts and the share of it that is pruned.

Every trial is a pruned network and one precision per part that fit the limit; its objective is the loss
against the dense network on the calibration structures. The first trials are the choices by measured
sensitivity and by mutual information; the others are proposed by a tree-structured Parzen estimator (optuna)
that has seen all earlier ones, and made to fit. Every proposal depends on the seed, its number and the trials
before it alone, so that a search that was killed ends as one that was not.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.model import EquiformerV2
from equiformer2.pruning.fingerprints import as_stored, check_same_work
from equiformer2.pruning.precision.allocation import (
    PRECISIONS,
    Choice,
    PartSizes,
    by_information,
    by_sensitivity,
    fitted,
)
from equiformer2.pruning.precision.products import Timing
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.values import Items, Number, Optional, Whole, mapping

_FORMAT = "equiformer2.precision_search"
_VERSION = 1
_WORST = 1e30  # JSON holds no infinity
_LOSS = Number(0, _WORST)
_REPEATS = 20


@dataclass(frozen=True)
class Trial:
    """Evaluated choice.

    Attributes:
        base: number of the pruned network.
        precisions: part -> precision.
        loss: on all calibration structures, eV.
        source: `sensitivity`, `information` or `search`.
    """

    base: int
    precisions: Choice
    loss: float
    source: str

    @staticmethod
    def read(value: Any, name: str) -> Trial:
        """Check a stored trial; a `values.Rule`."""
        if set(mapping(value, name)) != {"base", "precisions", "loss", "source"}:
            raise InputError(f"{name} must hold base, precisions, loss and source")
        precisions = dict(mapping(value["precisions"], f"{name}.precisions"))
        if not all(isinstance(p, str) and p in PRECISIONS for p in precisions.values()):
            raise InputError(f"{name}.precisions hold an unknown precision")
        base = Whole(0, 1000).read(value["base"], f"{name}.base")
        loss = _LOSS.read(value["loss"], f"{name}.loss")
        return Trial(base, precisions, loss, str(value["source"])[:100])


@dataclass
class PrecisionState:
    """All that a search has measured, and its file.

    Attributes:
        fingerprint: everything that the search depends on; a state of another search is refused.
        path: file that is written after every measurement; None keeps it in memory.
        sensitivity: part -> precision -> loss, eV.
        prunings: plans of the pruned networks, in their order; None for the dense one.
        timings: their measured times; None where time has no limit.
        count: number of trials; None until it is decided.
        trials: evaluated choices, in their order.
    """

    fingerprint: dict[str, Any]
    path: Path | None = None
    sensitivity: dict[str, dict[str, float]] = field(default_factory=dict)
    prunings: list[PruningPlan | None] | None = None
    timings: list[Timing | None] = field(default_factory=list)
    count: int | None = None
    trials: list[Trial] = field(default_factory=list)

    def save(self) -> None:
        """Write the state as JSON, atomically."""
        if self.path is None:
            return
        plans = None
        if self.prunings is not None:
            plans = [None if plan is None else plan.to_dict() for plan in self.prunings]
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "sensitivity": self.sensitivity,
            "prunings": plans,
            "timings": [None if timing is None else asdict(timing) for timing in self.timings],
            "count": self.count,
            "trials": [asdict(trial) for trial in self.trials],
        }
        write_json(self.path, values, make_folder=True)

    @classmethod
    def open(cls, path: AnyPath | None, fingerprint: dict[str, Any]) -> PrecisionState:
        """Continue the state in a file, or begin a new one.

        Args:
            path: the file, which need not exist; None keeps none.
            fingerprint: everything that the present search depends on.

        Raises:
            InputError: the file is no such state, or one of another search; the difference is named.
        """
        fingerprint = as_stored(fingerprint)
        path = None if path is None else Path(path)
        if path is None or not path.exists():
            return cls(fingerprint, path)
        try:
            state = cls._from_dict(read_json(path), path)
        except InputError as error:
            raise InputError(
                f"{path} is no state of a search for precisions ({error}): give another file or remove it"
            ) from error
        check_same_work(path, state.fingerprint, fingerprint)
        return state

    @classmethod
    def _from_dict(cls, values: dict[str, Any], path: Path) -> PrecisionState:
        if values.get("format") != _FORMAT or values.get("version") != _VERSION:
            raise InputError("its format is another one")
        losses = {
            part: {
                precision: _LOSS.read(loss, f"sensitivity.{part}")
                for precision, loss in mapping(row, f"sensitivity.{part}").items()
            }
            for part, row in mapping(values.get("sensitivity"), "sensitivity").items()
        }
        plans = values.get("prunings")
        if plans is not None:
            if not isinstance(plans, list):
                raise InputError("prunings must be a list")
            plans = [None if plan is None else PruningPlan.from_dict(plan, "prunings") for plan in plans]
        timings = Items(Optional(Timing)).read(values.get("timings", [None] * len(plans or ())), "timings")
        if len(timings) != len(plans or ()):
            raise InputError("timings must be as many as prunings")
        return cls(
            fingerprint=dict(mapping(values.get("fingerprint"), "fingerprint")),
            path=path,
            sensitivity=losses,
            prunings=plans,
            timings=timings,
            count=Optional(Whole(1, 100_000)).read(values.get("count"), "count"),
            trials=Items(Trial).read(values.get("trials"), "trials"),
        )


@dataclass(frozen=True)
class Base:
    """Dense or pruned network whose parts get precisions.

    Attributes:
        pruning: plan of the network; None for the dense one.
        model: the network, with plain weights, folded.
        parts: part -> its modules; with a limit of time alone, parts are branches.
        sizes: bytes or times of the parts and the room for them.
        timing: measured time; None where time has no limit.
    """

    pruning: PruningPlan | None
    model: EquiformerV2
    parts: Mapping[str, Sequence[str]]
    sizes: PartSizes
    timing: Timing | None = None

    def modules(self, choice: Mapping[str, str]) -> dict[str, str]:
        """Return module -> precision for part -> precision."""
        return {name: choice[part] for part, names in self.parts.items() for name in names}


class PrecisionSearch:
    """Bayesian search over the precisions of the parts and the pruned networks.

    Args:
        bases: networks to choose from, at least one; the smallest choice of each fits.
        losses: part -> precision -> loss with this part alone in it, eV.
        information: part -> mutual information, bits.
        evaluate: loss of a choice for a network, eV.
        state: trials in it are not evaluated again.
        seed: random seed.
        progress: show a progress bar.

    Raises:
        InputError: a trial in the state is of no network of `bases`.
    """

    def __init__(
        self,
        bases: Sequence[Base],
        losses: Mapping[str, Mapping[str, float]],
        information: Mapping[str, float],
        evaluate: Callable[[Base, Mapping[str, str]], float],
        state: PrecisionState,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.bases, self.losses, self.information, self.evaluate = bases, losses, information, evaluate
        self.state, self.seed, self.progress = state, seed, progress
        for trial in state.trials:
            if trial.base >= len(bases) or set(trial.precisions) != set(bases[trial.base].parts):
                raise InputError(
                    f"{state.path} holds a trial of another network: give another file or remove it"
                )

    def starts(self) -> list[tuple[int, Choice, str]]:
        """List the first trials: by sensitivity for every network, by information for the first."""
        losses = self.losses
        chosen = [
            (index, by_sensitivity(base.sizes, losses), "sensitivity")
            for index, base in enumerate(self.bases)
        ]
        chosen.insert(1, (0, by_information(self.bases[0].sizes, self.information), "information"))
        return chosen

    def run(self, count: int, end: float = math.inf) -> Trial:
        """Evaluate choices until there are `count` trials, at least the first ones.

        Args:
            count: number of trials.
            end: time, s of `time.monotonic`, by which the trials are over; at least one is made.

        Returns:
            The trial of the least loss; of equal ones the earliest.
        """
        starts = self.starts()
        trials, total = self.state.trials, max(count, len(starts))
        with tqdm(
            desc="precisions", unit="trials", total=total, initial=len(trials), disable=not self.progress
        ) as bar:
            longest = 0.0
            while len(trials) < total:
                begin = time.monotonic()
                if trials and begin + longest > end:
                    break
                number = len(trials)
                base, choice, source = starts[number] if number < len(starts) else self._proposed(number)
                known = [t.loss for t in trials if t.base == base and t.precisions == choice]
                loss = known[0] if known else min(self.evaluate(self.bases[base], choice), _WORST)
                trials.append(Trial(base, choice, loss, source))
                self.state.save()
                longest = max(longest, time.monotonic() - begin)
                bar.update()
                bar.set_postfix(best=f"{min(trial.loss for trial in trials):.4f} eV")
        return min(trials, key=lambda trial: trial.loss)

    def _proposed(self, number: int) -> tuple[int, Choice, str]:
        """Propose a choice that was not tried: that of the estimator, else one with a few random changes."""
        losses, rng = self.losses, np.random.default_rng((self.seed, number))
        base, wanted = self._asked(number)
        tried = [(trial.base, trial.precisions) for trial in self.state.trials]
        choice = fitted(self.bases[base].sizes, losses, wanted)
        for _ in range(_REPEATS):
            if (base, choice) not in tried:
                break
            part = list(choice)[int(rng.integers(len(choice)))]
            others = list(self.bases[base].sizes.costs[part])
            wanted = {**choice, part: others[int(rng.integers(len(others)))]}
            choice = fitted(self.bases[base].sizes, losses, wanted)
        return base, choice, "search"

    def _asked(self, number: int) -> tuple[int, Choice]:
        """Ask the estimator, which is told all trials so far."""
        optuna = import_optuna()
        parts = list(self.bases[0].sizes.costs)
        # A precision may be of use in some of the networks only: `fitted` replaces it in the others.
        costs = [base.sizes.costs for base in self.bases]
        choices = {
            part: [p for p in PRECISIONS if any(p in c.get(part, ()) for c in costs)] for part in parts
        }
        distributions = {
            "pruning": optuna.distributions.CategoricalDistribution(range(len(self.bases))),
            **{part: optuna.distributions.CategoricalDistribution(choices[part]) for part in parts},
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            seed = int(np.random.default_rng((self.seed, number, 1)).integers(2**31))
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True)
            study = optuna.create_study(sampler=sampler)
            for trial in self.state.trials:
                # Parts that a network does not have count as the smallest.
                values = {
                    "pruning": trial.base,
                    **{p: trial.precisions.get(p, choices[p][-1]) for p in parts},
                }
                study.add_trial(
                    optuna.trial.create_trial(params=values, distributions=distributions, value=trial.loss)
                )
            asked = study.ask(distributions).params
        base = int(asked.pop("pruning"))
        return base, {part: asked[part] for part in self.bases[base].parts}


def import_optuna() -> Any:
    """Import optuna, quietly.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "the search for precisions needs optuna: install it with `pip install 'optuna>=4.0'`, or give "
            "precisions with --plan or --uniform"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

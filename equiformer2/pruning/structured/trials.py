"""Trials of candidate cuts on calibration structures, with no more work than it takes to choose one.

- A pass begins at the first block that a cut changes, with the features of the present network; the answers
  have the bits of whole passes.
- Successive halving (Karnin et al., 2013; Jamieson and Talwalkar, 2016): all candidates run on few
  structures, the better half on twice as many, and so on.
- A candidate ends early once the part of its loss that is known is more than the candidates that go on have.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from equiformer2.batch_threads import map_all, side_by_side
from equiformer2.model import EquiformerV2
from equiformer2.model.routing import Prefix
from equiformer2.pruning.calibration import Calibration, in_evaluation_mode
from equiformer2.pruning.cost.work import Work
from equiformer2.pruning.stored_passes import LIMIT_BYTES, StoredPasses
from equiformer2.pruning.structured.apply import masked
from equiformer2.pruning.structured.candidate_cuts import Cut
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.unit_scores import FORCE_HEAD, NETWORK

Value = Callable[[Cut, float, float], float]
"""From a cut and the losses after and before it on the same structures to what it costs; the least wins.

It must rise with the loss after the cut.
"""


@dataclass(frozen=True, eq=False)
class Trial:
    """Cut that is tried on some of the batches.

    Attributes:
        cut: the cut.
        errors: number of a batch -> `Calibration.errors` of it after the cut.
        passes: number of a batch -> passes over it after the cut; empty once the cut is out of the race.
    """

    cut: Cut
    errors: dict[int, Tensor] = field(default_factory=dict)
    passes: dict[int, list[Prefix]] = field(default_factory=dict)


class Trials:
    """Present plan of a search on the calibration batches, and candidates to be the next.

    Args:
        model: dense network.
        calibration: structures with the dense answers.
        work: counts the passes.
        plan: present plan.

    Attributes:
        plan: present plan.
        errors: number of a batch -> `Calibration.errors` of the present plan, as far as they are known.
    """

    def __init__(self, model: EquiformerV2, calibration: Calibration, work: Work, plan: PruningPlan) -> None:
        self.model, self.calibration, self.work, self.plan = model, calibration, work, plan
        self.errors: dict[int, Tensor] = {}
        device = model.sphere_embedding.weight.device
        limit = LIMIT_BYTES if model.resolve_backend().partial else 0
        self._passes = StoredPasses(model.config, calibration.sizes, limit)
        self._map = functools.partial(map_all, device=device)
        self._at_once = side_by_side(None, device)
        self._outer = ExitStack()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Context in which the network is cut as the present plan says; trials are made inside."""
        with in_evaluation_mode(self.model), ExitStack() as self._outer:
            self._outer.enter_context(masked(self.model, self.plan))
            yield

    def losses(self, trial: Trial) -> tuple[float, float]:
        """Return the losses after and before a cut on the batches on which it was tried, eV."""
        batches = sorted(trial.errors)
        return self.calibration.loss_on(batches, trial.errors), self.loss_before(batches)

    def loss_before(self, batches: Sequence[int]) -> float:
        """Return the loss of the present plan on some batches, eV."""
        return self.calibration.loss_on(batches, self.errors)

    def race(
        self,
        cuts: Sequence[Cut],
        value: Value,
        first: int | None = None,
        bounds: bool = True,
        turn: int = 0,
    ) -> tuple[Trial, list[Trial]]:
        """Find the best of several cuts.

        Args:
            cuts: at least one, the most promising first.
            value: what a cut costs.
            first: number of structures of the first round, doubled in every other; None for all of them at
                once. Whole batches are used.
            bounds: end the trial of a cut that cannot go on any more.
            turn: number of the race; every one begins with other structures, so that cuts which are harmless
                on some by chance do not add up.

        Returns:
            The winner, and the trials of all cuts in the given order.
        """
        live = trials = [Trial(cut) for cut in cuts]
        total, count = len(self.calibration.batches), self._batches_of(first)
        order = [(turn * count + place) % total for place in range(total)]
        while True:
            batches, done = order[:count], list[tuple[float, Trial]]()
            staying = 1 if count == total else (len(live) + 1) // 2
            self._complete(batches)
            before = self.loss_before(batches)
            for trial in live:
                values = sorted(known for known, _ in done)
                limit = values[staying - 1] if bounds and len(values) >= staying else None
                if self._extend(trial, batches, value, limit):
                    loss = self.calibration.loss_on(batches, trial.errors)
                    done.append((value(trial.cut, loss, before), trial))
                best = [known for _, known in sorted(done, key=lambda item: item[0])[:staying]]
                for known in {trial, *(known for _, known in done)} - {*best}:
                    known.passes.clear()
            live = best
            if staying == 1:
                return live[0], trials
            count = min(2 * count, total)

    def take(self, trial: Trial) -> float:
        """Make the plan after a cut the present one, with its errors on all batches.

        Args:
            trial: the cut.

        Returns:
            Its loss, eV.
        """
        batches, start = range(len(self.calibration.batches)), self._start(trial.cut)
        self._complete(batches)
        self._extend(trial, batches)
        for index in batches:
            self._passes.put(index, trial.passes[index], -1 if start is None else start)
        if start is None:
            self._outer.close()
        self._outer.enter_context(
            masked(self.model, trial.cut.plan, within=None if start is None else self.plan)
        )
        self.plan, self.errors = trial.cut.plan, dict(trial.errors)
        return self.calibration.loss_on(batches, self.errors)

    def _batches_of(self, structures: int | None) -> int:
        """Number of the first batches that hold at least so many structures; all for None."""
        count = held = 0
        for size, _, _ in self.calibration.sizes:
            if structures is not None and held >= structures:
                break
            count, held = count + 1, held + size
        return count

    def _start(self, cut: Cut) -> int | None:
        """First block that a cut changes; the number of blocks for the heads, None for everything."""
        if cut.site == NETWORK:
            return None
        return len(self.model.blocks) if cut.site == FORCE_HEAD else int(cut.site)

    def _complete(self, batches: Sequence[int]) -> None:
        """Run the present plan where this has not been done: at the beginning of a search."""
        missing = [index for index in batches if index not in self.errors]
        for index, (errors, passes) in self._run(missing, None):
            self.errors[index] = errors
            self._passes.put(index, passes)

    def _extend(
        self,
        trial: Trial,
        batches: Sequence[int],
        value: Value | None = None,
        limit: float | None = None,
    ) -> bool:
        """Run a trial on more batches; False if it has ended because its value is above `limit`."""
        before = self.loss_before(batches)
        missing = [index for index in batches if index not in trial.errors]
        with self._cut(trial.cut):
            while missing:
                if value is not None and limit is not None:
                    known = self.calibration.loss_on(batches, trial.errors)
                    if value(trial.cut, known, before) > limit:
                        return False
                for index, (errors, passes) in self._run(missing[: self._at_once], self._start(trial.cut)):
                    trial.errors[index], trial.passes[index] = errors, passes
                missing = missing[self._at_once :]
        return True

    def _run(
        self, batches: Sequence[int], first: int | None
    ) -> Iterator[tuple[int, tuple[Tensor, list[Prefix]]]]:
        """Run the network as it is masked now on some batches, from block `first` on; several at a time.

        Yields:
            Number, errors and passes of each batch.
        """
        starts = {index: self._passes.before(index, first) for index in batches}

        def run(index: int) -> tuple[Tensor, list[Prefix]]:
            start, passes = starts[index], list[Prefix]()

            def keep(prefix: Prefix) -> None:
                if prefix.block in self._passes.blocks and (start is None or prefix.block > start.block):
                    passes.append(prefix)

            given = {"start": start, "keep": keep} if self._passes.blocks else {}
            return self.calibration.errors(index, self.model, **given), passes

        for index, result in zip(batches, self._map(run, batches), strict=True):
            start = starts[index]
            self.work.add(self.work.of_pass(index, None if start is None else start.block))
            yield index, result

    @contextmanager
    def _cut(self, cut: Cut) -> Iterator[None]:
        """Context in which the network is cut further."""
        if cut.site != NETWORK:
            with masked(self.model, cut.plan, within=self.plan):
                yield
            return
        self._outer.close()  # sphere channels are masked once
        try:
            with masked(self.model, cut.plan):
                yield
        finally:
            self._outer.enter_context(masked(self.model, self.plan))

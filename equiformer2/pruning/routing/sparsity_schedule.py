"""Sparsity of every block, found by a genetic search (FTP, arXiv 2412.11494).

Most of a search's cost is the network's, so that a schedule that will not be chosen is to see little of it:

- Where the MACs follow from the structures alone, a schedule is moved to the target before the network runs.
- At first each block skips alone, on an eighth of the structures. Schedules that skip the less in a block the
  more it does to the loss are good ones to begin with.
- Successive halving: all new schedules of a generation run on an eighth of the structures, the better half on
  as many again, and so on; the last ones on all. One that cannot be better than the best is dropped.
- Most children take the levels of the first blocks from one parent, so that the features there are known.

The schedule that is chosen has run on all structures.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from equiformer2.batch_threads import map_batches
from equiformer2.errors import InputError
from equiformer2.pruning.routing.schedule_objective import Measurement


class Objective(Protocol):
    """Loss and operations of schedules, for instance `ScheduleObjective`."""

    @property
    def parts(self) -> int:
        """Number of parts of the structures."""

    @property
    def threads(self) -> int:
        """Number of measurements that can be made at a time."""

    def macs(self, levels: Sequence[float]) -> float | None:
        """Return the share of the dense MACs on all structures; None where only `measure` can tell."""

    def measure(self, levels: Sequence[float], part: int) -> Measurement:
        """Run a schedule on one part of the structures."""


_MOST = 0.95
_CLOSE = 5
"""A schedule is moved to within this part of the tolerance below the target: tolerance / 5."""
_SHIFTS = 12
_CORRECTIONS = 3
"""Most runs again of one schedule whose MACs only the network tells, until they are right."""
_FIRST = 8
"""New schedules run on an eighth of the structures first."""
_SLACK = 0.1
"""There a schedule may be worse than the best one by this share of the loss and still go on; on n times as
many structures by this over the root of n."""
_ONE_POINT = 0.8
"""Share of the children that take the levels of the first blocks from one parent."""
_POWERS = (0.5, 1.0, 2.0)
"""Powers of the damage by which the levels of blocks fall in schedules to begin with."""


class TargetMissedError(InputError):
    """No schedule comes near the target share of the MACs."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Best schedule of a search.

    Attributes:
        levels: fraction of the atoms to skip in every block.
        loss: its loss on all structures.
        macs: share of the dense MACs that it leaves.
        history: best loss after every generation, among those that reach the target.
        evaluations: number of schedules that the network ran on some of the structures.
        passes: what the search ran, in passes of the dense network over one structure.
    """

    levels: tuple[float, ...]
    loss: float
    macs: float
    history: tuple[float, ...]
    evaluations: int
    passes: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no infinity: None stands for it."""
        values = dataclasses.asdict(self)
        return values | {"history": [loss if loss < float("inf") else None for loss in self.history]}


def search_schedule(
    objective: Objective,
    num_blocks: int,
    target_macs: float,
    *,
    start: Sequence[Sequence[float]] = (),
    protected: Sequence[int] = (),
    population: int = 16,
    generations: int = 8,
    tolerance: float = 0.02,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> Schedule:
    """Find the schedule with the lowest loss at a share of the MACs.

    Tournaments, crossover between two parents, Gaussian mutation; the best ones are always kept. A child that
    misses the target is moved towards it. Those that reach it are ranked by their loss, the others after them
    by their distance. The target is an upper bound: more operations would make a schedule look better.

    Args:
        objective: loss and operations, for instance `ScheduleObjective`.
        num_blocks: number of blocks.
        target_macs: share of the dense network's MACs that is to stay.
        start: schedules that are tried first, beside uniform, rising and falling ones and one in which the
            first and the last block compute everything.
        protected: blocks that compute all atoms and are no part of the search.
        population: schedules per generation, at least 4.
        generations: number of generations after the first.
        tolerance: a schedule reaches the target with `target_macs - tolerance` to `target_macs`.
        seed: random seed.
        progress: called with the share of the search that is done and the best loss so far (infinite before).

    Returns:
        The best schedule that reaches the target.

    Raises:
        InputError: the settings leave nothing to search.
        TargetMissedError: no schedule reached the target.
    """
    trials = _Trials(objective, num_blocks, target_macs, tolerance, protected)
    if population < 4 or generations < 1:
        raise InputError("the search needs a population of at least 4 and at least 1 generation")
    search = _GeneticSearch(trials, np.random.default_rng(seed), generations, progress)
    people = search.first(start, population)
    history = [trials.best().shown_loss]
    for _ in range(generations):
        people = search.next_generation(people, population)
        history.append(trials.best().shown_loss)
    return trials.schedule(trials.best(), history)


def uniform_schedule(
    objective: Objective,
    num_blocks: int,
    target_macs: float,
    *,
    protected: Sequence[int] = (),
    tolerance: float = 0.02,
) -> Schedule:
    """Find one level for all blocks that are not protected: the baseline of `search_schedule`.

    Args:
        objective: loss and operations, for instance `ScheduleObjective`.
        num_blocks: number of blocks.
        target_macs: share of the dense network's MACs that is to stay.
        protected: blocks that compute all atoms and are no part of the search.
        tolerance: a schedule reaches the target with `target_macs - tolerance` to `target_macs`.

    Returns:
        The schedule nearest below the target.

    Raises:
        InputError: the settings leave nothing to search.
        TargetMissedError: no schedule reached the target.
    """
    trials = _Trials(objective, num_blocks, target_macs, tolerance, protected)
    best = trials.settled(trials.near(np.full(len(trials.open), 1 - target_macs)), objective.parts)
    return trials.schedule(best, [best.loss])


@dataclasses.dataclass(eq=False)
class _Individual:
    """Schedule with what is known of it.

    Attributes:
        levels: fraction of the atoms to skip in every block.
        macs: share of the dense MACs; predicted or estimated until all parts have run.
        miss: distance of `macs` from the allowed range.
        results: measurements on the first parts of the structures.
        loss: loss on all structures, estimated from `results`; infinite before.
    """

    levels: tuple[float, ...]
    macs: float
    miss: float
    results: list[Measurement] = dataclasses.field(default_factory=list)
    loss: float = float("inf")

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is better."""
        return self.miss, self.loss

    @property
    def shown_loss(self) -> float:
        return self.loss if self.miss == 0 else float("inf")


class _Trials:
    """Schedules at levels of the blocks that are not protected, each measured once on each part."""

    def __init__(
        self,
        objective: Objective,
        num_blocks: int,
        target: float,
        tolerance: float,
        protected: Sequence[int],
    ) -> None:
        self.open = [block for block in range(num_blocks) if block not in protected]
        if not self.open:
            raise InputError(f"all of the {num_blocks} blocks are protected: there is nothing to search")
        if not 0 < target < 1:
            raise InputError(f"target_macs is {target}: give a fraction between 0 and 1")
        self.objective, self.num_blocks, self.target, self.tolerance = (
            objective,
            num_blocks,
            target,
            tolerance,
        )
        self.known: dict[tuple[float, ...], _Individual] = {}
        self.exact = objective.macs([0.0] * num_blocks) is not None
        self.first = math.ceil(objective.parts / _FIRST)
        self._profile = np.full(objective.parts, 1 / objective.parts)
        self._ratios: dict[tuple[float, ...], float] = {}

    def genes(self, person: _Individual) -> np.ndarray:
        """Levels of the open blocks."""
        return np.array([person.levels[block] for block in self.open])

    def near(self, genes: np.ndarray, first: int = 0, like: _Individual | None = None) -> _Individual:
        """The schedule with these levels of the open blocks, all moved to the target by an equal step.

        Args:
            genes: levels of the open blocks.
            first: the first open block that may be moved, if that is enough.
            like: a similar schedule whose MACs are known, where they do not follow from the structures.

        Returns:
            The schedule; its MACs are predicted.
        """
        aim, close = self.target, self.tolerance / _CLOSE
        if not self.exact:
            aim, close = self.target - 0.3 * self.tolerance, 0.4 * self.tolerance
        low, high, step = -1.0, 1.0, 0.0
        best: tuple[float, tuple[float, ...], float] | None = None
        for _ in range(_SHIFTS):
            levels = self._rounded(np.concatenate((genes[:first], genes[first:] + step)))
            macs = self._predicted(levels, like)
            distance = macs - aim if macs > aim else max(aim - close - macs, 0.0)
            if best is None or distance < best[0]:
                best = distance, levels, macs
            if distance == 0:
                break
            low, high = (step, high) if macs > aim else (low, step)
            # Each level removes about its share of the MACs of one block.
            step += (macs - aim + close / 2) * self.num_blocks / (len(self.open) - first)
            if not low < step < high:
                step = (low + high) / 2
        assert best is not None
        miss = self._miss(best[2])
        if miss > 0 and first > 0:
            return self.near(genes, 0, like)
        return self.known.setdefault(best[1], _Individual(best[1], best[2], miss))

    def alone(self, block: int, level: float) -> _Individual:
        """The schedule that skips in one block alone."""
        levels = [0.0] * self.num_blocks
        levels[block] = round(level, 3)
        macs = self._predicted(tuple(levels), None)
        return self.known.setdefault(tuple(levels), _Individual(tuple(levels), macs, self._miss(macs)))

    def run(
        self, people: Sequence[_Individual], parts: int, show: Callable[[float], None] = lambda done: None
    ) -> None:
        """Measure schedules on the first parts of the structures, where they are not known yet.

        Args:
            people: the schedules.
            parts: number of parts.
            show: called after every measurement with the share of them that is done.
        """
        # Neighbours share the features of the first blocks, so they follow each other on one thread.
        people = sorted(people, key=lambda person: person.levels)
        missing = [
            (part, [person for person in people if len(person.results) <= part]) for part in range(parts)
        ]
        missing = [(part, group) for part, group in missing if group]
        threads = self.objective.threads
        pieces = math.ceil(threads / max(1, len(missing)))
        tasks = [
            (part, group[len(group) * piece // pieces : len(group) * (piece + 1) // pieces])
            for part, group in missing
            for piece in range(pieces)
        ]

        finished: list[int] = []

        def measure(task: tuple[int, list[_Individual]]) -> list[tuple[_Individual, Measurement]]:
            out = []
            for person in task[1]:
                out.append((person, self.objective.measure(person.levels, task[0])))
                finished.append(task[0])
                show(len(finished) / sum(len(group) for _, group in missing))
            return out

        for results in map_batches(measure, tasks, count=threads):
            for person, result in results:
                person.results.append(result)
        for person in people:
            self._judge(person)

    def settled(self, person: _Individual, parts: int) -> _Individual:
        """Measure a schedule on some parts; if only that tells its MACs, move it until they are right."""
        self.run([person], parts)
        for _ in range(_CORRECTIONS):
            if self.exact or person.miss == 0:
                break
            person = self.near(self.genes(person), like=person)
            self.run([person], parts)
        return person

    def weigh(self) -> None:
        """Estimate losses by the share that each part has in those of the complete schedules."""
        rows = [[result.loss for result in person.results] for person in self.complete]
        table = np.array([row for row in rows if 0 < sum(row) < float("inf")])
        if len(table):
            self._profile = (table / table.sum(axis=1, keepdims=True)).mean(axis=0)
        for person in self.known.values():
            self._judge(person)

    @property
    def complete(self) -> list[_Individual]:
        """Schedules that ran on all structures."""
        return [person for person in self.known.values() if len(person.results) == self.objective.parts]

    def best(self) -> _Individual:
        """The best schedule that ran on all structures; without one, the nearest to the target."""
        return min(self.complete or self.known.values(), key=lambda person: person.rank)

    def schedule(self, best: _Individual, history: Sequence[float]) -> Schedule:
        """The result of a search; `TargetMissedError` if the best schedule does not reach the target."""
        if best.miss > 0:
            raise TargetMissedError(
                f"no schedule came within {self.target - self.tolerance:.3g} to {self.target:.3g} of the "
                f"MACs (nearest: {best.macs:.3f}): choose another target or a larger tolerance, protect "
                "fewer blocks or search longer"
            )
        ran = [person.results for person in self.known.values() if person.results]
        passes = sum(result.passes for results in ran for result in results)
        return Schedule(best.levels, best.loss, best.macs, tuple(history), len(ran), passes)

    def _rounded(self, genes: np.ndarray) -> tuple[float, ...]:
        levels = [0.0] * self.num_blocks
        for block, gene in zip(self.open, genes, strict=True):
            levels[block] = round(float(np.clip(gene, 0.0, _MOST)), 3)
        return tuple(levels)

    def _predicted(self, levels: tuple[float, ...], like: _Individual | None) -> float:
        """Share of the MACs: from the structures, else in proportion to the levels."""
        if self.exact:
            macs = self.objective.macs(levels)
            assert macs is not None
            return macs
        ratio = float(np.median([*self._ratios.values()] or 1.0)) if like is None else self._ratio(like)
        return 1 - ratio * sum(levels) / self.num_blocks

    def _ratio(self, person: _Individual) -> float:
        return (1 - person.macs) * self.num_blocks / max(sum(person.levels), 1e-3)

    def _judge(self, person: _Individual) -> None:
        """Estimate loss and MACs from the results so far; of all parts they are exact."""
        done, results = len(person.results), person.results
        if done:
            loss, whole = sum(result.loss for result in results), done == self.objective.parts
            person.loss = loss if whole else loss / float(self._profile[:done].sum())
        if done and not self.exact:
            person.macs = sum(result.macs for result in results) / sum(result.dense for result in results)
            person.miss = self._miss(person.macs)
            self._ratios[person.levels] = self._ratio(person)

    def _miss(self, macs: float) -> float:
        return max(macs - self.target, self.target - self.tolerance - macs, 0.0)


class _GeneticSearch:
    """Generations of schedules."""

    def __init__(
        self,
        trials: _Trials,
        rng: np.random.Generator,
        generations: int,
        progress: Callable[[float, float], None] | None,
    ) -> None:
        self.trials, self.rng, self.progress = trials, rng, progress
        self.open, self.num_blocks, self.target = trials.open, trials.num_blocks, trials.target
        self.generation, self.generations = 0, generations

    def first(self, given: Sequence[Sequence[float]], population: int) -> list[_Individual]:
        """The first generation: given, uniform, rising, falling and random schedules."""
        n = len(self.open)
        share = min(_MOST, (1 - self.target) * self.num_blocks / n)
        ramp = np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1)
        shapes = [np.array([levels[b] for b in self.open]) for levels in given]
        shapes += [np.full(n, share), share * (1 + 0.5 * ramp), share * (1 - 0.5 * ramp)]
        ends = [self.open.index(block) for block in (0, self.num_blocks - 1) if block in self.open]
        if len(ends) < n:
            inner = np.full(n, min(_MOST, share * n / (n - len(ends))))
            inner[ends] = 0.0
            shapes.append(inner)
        shapes += self.by_damage(share)
        while len(shapes) < population:
            shapes.append(share + 0.3 * self.rng.standard_normal(n))
        return self.race([self.trials.near(shape) for shape in shapes])

    def by_damage(self, share: float) -> list[np.ndarray]:
        """Levels that are the lower the more a block does to the loss when it skips `share` alone."""
        alone = [self.trials.alone(block, share) for block in self.open]
        self.trials.run(alone, self.trials.first)
        damages = np.array([person.loss for person in alone])
        if not 0 < damages.min() <= damages.max() < float("inf"):
            return []
        genes = [damages**-power for power in _POWERS]
        return [np.minimum(_MOST, share * values / values.mean()) for values in genes]

    def next_generation(self, people: list[_Individual], population: int) -> list[_Individual]:
        """The best of a generation and its children."""
        children = [self.child(people) for _ in range(population)]
        people = list(dict.fromkeys((*people, *self.race(children))))
        return sorted(people, key=lambda person: person.rank)[:population]

    def child(self, people: list[_Individual]) -> _Individual:
        """A schedule with the first levels of one parent and a mixture of both after them."""
        mother, father = self.tournament(people), self.tournament(people)
        genes, n = self.trials.genes(mother), len(self.open)
        first = int(self.rng.integers(n)) if self.rng.random() < _ONE_POINT else 0
        weight = self.rng.uniform(-0.25, 1.25, n)
        mixed = weight * genes + (1 - weight) * self.trials.genes(father)
        mutated = self.rng.random(n) < max(0.3, 1 / n)
        mixed = mixed + 0.1 * mutated * self.rng.standard_normal(n)
        first = min(first, n - 2) if n > 1 else 0
        return self.trials.near(np.concatenate((genes[:first], mixed[first:])), first)

    def tournament(self, people: list[_Individual]) -> _Individual:
        return min(
            [people[i] for i in self.rng.integers(len(people), size=3)], key=lambda person: person.rank
        )

    def race(self, people: list[_Individual]) -> list[_Individual]:
        """Run schedules on more and more parts of the structures, fewer and fewer of them.

        Returns:
            The schedules; some of them moved to the target where the network alone tells their MACs.
        """
        trials, parts = self.trials, self.trials.objective.parts
        people = people if trials.exact else [trials.settled(person, trials.first) for person in people]
        rungs = [trials.first]
        while rungs[-1] < parts:
            rungs.append(min(2 * rungs[-1], parts))
        going = list(dict.fromkeys(person for person in people if person.miss == 0))
        for number, rung in enumerate(rungs):
            going = self.promising(going)[: math.ceil(len(people) / 2**number)]
            before = number / len(rungs)
            trials.run(going, rung, lambda done, before=before: self.show(before + done / len(rungs)))  # type: ignore[misc]
            trials.weigh()
        if not trials.exact:
            people = people + [trials.settled(person, parts) for person in going]
        self.generation += 1
        self.show(0.0)
        return people

    def promising(self, people: list[_Individual]) -> list[_Individual]:
        """Return the schedules that can still be better than the best one, the most promising first."""
        best = self.trials.best()
        limit = best.loss if len(best.results) == self.trials.objective.parts else float("inf")

        def hopeless(person: _Individual) -> bool:
            done = len(person.results)
            if done == 0:
                return False
            certain = sum(result.loss for result in person.results) >= limit
            return person is not best and (
                certain or person.loss > limit * (1 + _SLACK * math.sqrt(self.trials.first / done))
            )

        return sorted((p for p in people if not hopeless(p)), key=lambda person: person.loss)

    def show(self, share: float) -> None:
        """Report the share of the search that is done, of which `share` of the present generation."""
        if self.progress is not None:
            done = min(1.0, (self.generation + share) / (self.generations + 1))
            self.progress(done, self.trials.best().shown_loss)

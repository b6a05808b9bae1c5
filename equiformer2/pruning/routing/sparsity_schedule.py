"""Sparsity of every block, found by a genetic search (FTP, arXiv 2412.11494)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.routing.computed_shares import ComputedShares, CountingRouter
from equiformer2.pruning.routing.router import BaseRouter


class RoutedModel:
    """Network under a router, called like a network; counts the computed atoms, edges and MACs.

    Args:
        model: the network.
        router: router that decides.

    Attributes:
        model: the network.
        router: the router.
    """

    def __init__(self, model: EquiformerV2, router: BaseRouter) -> None:
        self.model, self.router, self._counter = model, router, CountingRouter(router)

    def __call__(self, batch: Batch, graph: RadiusGraph | None = None) -> Mapping[str, Tensor]:
        """Return `energy [B]` and `forces [N, 3]`, in normalised units."""
        return self._counter(self.model, batch, graph)

    def computed_shares(self) -> ComputedShares:
        """Return the shares of the dense network's work over all calls so far."""
        return self._counter.computed_shares(self.model.config)


@dataclasses.dataclass
class ScheduleObjective:
    """Objective of `search_schedule`: discrepancy to the dense network and MACs, without labels.

    Attributes:
        model: the network.
        calibration: structures with the dense network's answers.
        make_router: from levels to a router, for instance `StaticRouter` or `router.with_levels`.
    """

    model: EquiformerV2
    calibration: Calibration
    make_router: Callable[[Sequence[float]], BaseRouter]

    def __call__(self, levels: Sequence[float]) -> tuple[float, float]:
        """Return the loss (eV) and the share of the dense MACs of a schedule.

        Args:
            levels: fraction of the atoms to skip in every block.
        """
        routed = RoutedModel(self.model, self.make_router(levels))
        loss = self.calibration.loss(routed)
        return loss, routed.computed_shares().macs


Evaluate = Callable[[Sequence[float]], tuple[float, float]]
"""Function from the levels of all blocks to the loss and the share of the dense MACs."""
_MOST = 0.95
_BISECTIONS = 10
_CLOSE = 5
"""A bisection ends within this part of the tolerance: tolerance / 5."""
_SHIFTS = 3


class TargetMissedError(InputError):
    """No schedule comes near the target share of the MACs."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Best schedule of a search.

    Attributes:
        levels: fraction of the atoms to skip in every block.
        loss: its loss.
        macs: share of the dense MACs that it leaves.
        history: best loss after every generation, among those that reach the target.
        evaluations: number of schedules that were tried.
    """

    levels: tuple[float, ...]
    loss: float
    macs: float
    history: tuple[float, ...]
    evaluations: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no infinity: None stands for it."""
        values = dataclasses.asdict(self)
        return values | {"history": [loss if loss < float("inf") else None for loss in self.history]}


def search_schedule(
    evaluate: Evaluate,
    num_blocks: int,
    target_macs: float,
    *,
    start: Sequence[Sequence[float]] = (),
    protected: Sequence[int] = (),
    population: int = 16,
    generations: int = 10,
    tolerance: float = 0.02,
    seed: int = 0,
    after_try: Callable[[], None] | None = None,
) -> Schedule:
    """Find the schedule with the lowest loss at a share of the MACs.

    Tournaments, crossover between two parents, Gaussian mutation; the best ones are always kept. A child that
    misses the target is moved towards it. Those that reach it are ranked by their loss, the others after them
    by their distance. The target is an upper bound: more operations would make a schedule look better.

    Args:
        evaluate: objective, for instance `ScheduleObjective`.
        num_blocks: number of blocks.
        target_macs: share of the dense network's MACs that is to stay.
        start: schedules that are tried first, beside uniform, rising and falling ones and one in which the
            first and the last block compute everything.
        protected: blocks that compute all atoms and are no part of the search.
        population: schedules per generation, at least 4.
        generations: number of generations after the first.
        tolerance: a schedule reaches the target with `target_macs - tolerance` to `target_macs`.
        seed: random seed.
        after_try: called for every member of every generation, population * (generations + 1) times
            or some more.

    Returns:
        The best schedule that reaches the target.

    Raises:
        InputError: the settings leave nothing to search.
        TargetMissedError: no schedule reached the target.
    """
    trials = _Trials(evaluate, num_blocks, target_macs, tolerance, protected)
    if population < 4 or generations < 1:
        raise InputError("the search needs a population of at least 4 and at least 1 generation")
    search = _GeneticSearch(trials, np.random.default_rng(seed), after_try)
    people = search.first(start, population)
    history = [search.best(people).shown_loss]
    for _ in range(generations):
        people = search.next_generation(people, population)
        history.append(search.best(people).shown_loss)
    return trials.schedule(search.best(people), history)


def uniform_schedule(
    evaluate: Evaluate,
    num_blocks: int,
    target_macs: float,
    *,
    protected: Sequence[int] = (),
    tolerance: float = 0.02,
) -> Schedule:
    """Find one level for all blocks that are not protected: the baseline of `search_schedule`.

    Found by bisection, since the MACs fall with the level.

    Args:
        evaluate: objective, for instance `ScheduleObjective`.
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
    trials = _Trials(evaluate, num_blocks, target_macs, tolerance, protected)
    low, high = 0.0, _MOST
    for _ in range(_BISECTIONS):
        level = (low + high) / 2
        macs = trials.individual(np.full(len(trials.open), level)).macs
        if 0 <= target_macs - macs < tolerance / _CLOSE:
            break
        if macs > target_macs:
            low = round(level, 3)
        else:
            high = round(level, 3)
    best = min(trials.known.values(), key=lambda person: (person.miss, target_macs - person.macs))
    return trials.schedule(best, [best.loss])


@dataclasses.dataclass(frozen=True)
class _Individual:
    """Schedule that was tried; `miss` is its distance from the allowed range of MACs."""

    levels: tuple[float, ...]
    loss: float
    macs: float
    miss: float

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is better."""
        return self.miss, self.loss

    @property
    def shown_loss(self) -> float:
        return self.loss if self.miss == 0 else float("inf")


class _Trials:
    """Schedules at levels of the blocks that are not protected, each evaluated once."""

    def __init__(
        self,
        evaluate: Evaluate,
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
        self.evaluate, self.num_blocks, self.target, self.tolerance = evaluate, num_blocks, target, tolerance
        self.known: dict[tuple[float, ...], _Individual] = {}

    def individual(self, genes: np.ndarray) -> _Individual:
        """The schedule with these levels of the open blocks, cut to the allowed range and rounded."""
        levels = [0.0] * self.num_blocks
        for block, gene in zip(self.open, genes, strict=True):
            levels[block] = round(float(np.clip(gene, 0.0, _MOST)), 3)
        key = tuple(levels)
        if key not in self.known:
            loss, macs = self.evaluate(key)
            loss = loss if np.isfinite(loss) else float("inf")
            miss = max(macs - self.target, self.target - self.tolerance - macs, 0.0)
            self.known[key] = _Individual(key, loss, macs, miss)
        return self.known[key]

    def schedule(self, best: _Individual, history: Sequence[float]) -> Schedule:
        """The result of a search; `TargetMissedError` if the best schedule does not reach the target."""
        if best.miss > 0:
            raise TargetMissedError(
                f"no schedule came within {self.target - self.tolerance:.3g} to {self.target:.3g} of the "
                f"MACs (nearest: {best.macs:.3f}): choose another target or a larger tolerance, protect "
                "fewer blocks or search longer"
            )
        return Schedule(best.levels, best.loss, best.macs, tuple(history), len(self.known))


class _GeneticSearch:
    """Generations of schedules."""

    def __init__(
        self, trials: _Trials, rng: np.random.Generator, after_try: Callable[[], None] | None
    ) -> None:
        self.trials, self.rng, self.after_try = trials, rng, after_try
        self.open, self.num_blocks, self.target = trials.open, trials.num_blocks, trials.target

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
        while len(shapes) < population:
            shapes.append(share + 0.3 * self.rng.standard_normal(n))
        return [self.try_near(shape) for shape in shapes]

    def next_generation(self, people: list[_Individual], population: int) -> list[_Individual]:
        """The best of a generation and its children."""
        children = []
        for _ in range(population):
            mother, father = self.tournament(people), self.tournament(people)
            weight = self.rng.uniform(-0.25, 1.25, len(self.open))
            genes = weight * self.genes(mother) + (1 - weight) * self.genes(father)
            mutated = self.rng.random(len(genes)) < max(0.3, 1 / len(genes))
            children.append(self.try_near(genes + 0.1 * mutated * self.rng.standard_normal(len(genes))))
        unique = {person.levels: person for person in (*people, *children)}
        return sorted(unique.values(), key=lambda person: person.rank)[:population]

    def best(self, people: list[_Individual]) -> _Individual:
        return min(people, key=lambda person: person.rank)

    def tournament(self, people: list[_Individual]) -> _Individual:
        return self.best([people[i] for i in self.rng.integers(len(people), size=3)])

    def genes(self, person: _Individual) -> np.ndarray:
        return np.array([person.levels[block] for block in self.open])

    def try_near(self, genes: np.ndarray) -> _Individual:
        """Evaluate, and again after shifts towards the middle of the range (MACs fall nearly linearly)."""
        aim = self.target - self.trials.tolerance / 2
        person = self.trials.individual(genes)
        for _ in range(_SHIFTS):
            if person.miss == 0:
                break
            # Each level removes about its share of the MACs of one block.
            saved = 1 - person.macs
            shift = (person.macs - aim) * self.num_blocks / len(self.open)
            if saved > 0.02:
                shift = float(self.genes(person).mean()) * ((1 - aim) / saved - 1)
            again = self.trials.individual(self.genes(person) + shift)
            if again.miss >= person.miss:
                break
            person = again
        if self.after_try is not None:
            self.after_try()
        return person

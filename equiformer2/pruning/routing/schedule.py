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
from equiformer2.pruning.routing.achieved import Achieved, Recorder
from equiformer2.pruning.routing.router import BaseRouter


class RoutedModel:
    """A network under a router, called like a network; counts what it computes.

    Args:
        model: the network.
        router: what decides.
    """

    def __init__(self, model: EquiformerV2, router: BaseRouter) -> None:
        self.model, self.recorder = model, Recorder(router)

    def __call__(self, batch: Batch, graph: RadiusGraph | None = None) -> Mapping[str, Tensor]:
        """Energies and forces."""
        return self.recorder(self.model, batch, graph)

    def achieved(self) -> Achieved:
        """Of all calls so far."""
        return self.recorder.achieved(self.model.config)


@dataclasses.dataclass
class ScheduleObjective:
    """`evaluate` of `search_schedule`: discrepancy to the dense network and MACs, without labels.

    Attributes:
        model: the network.
        calibration: structures with the dense network's answers.
        make_router: from levels to a router, for instance `StaticRouter` or a trained router with new levels.
    """

    model: EquiformerV2
    calibration: Calibration
    make_router: Callable[[Sequence[float]], BaseRouter]

    def __call__(self, levels: Sequence[float]) -> tuple[float, float]:
        """Loss (eV) and fraction of the dense MACs."""
        routed = RoutedModel(self.model, self.make_router(levels))
        loss = self.calibration.loss(routed)
        return loss, routed.achieved().macs


def with_levels(router: BaseRouter, levels: Sequence[float | None], **changes: Any) -> BaseRouter:
    """The same router with other levels."""
    return type(router)(**router.settings() | {"levels": list(levels)} | changes)


Evaluate = Callable[[Sequence[float]], tuple[float, float]]
"""Levels of all blocks to (loss, fraction of the dense MACs)."""
_MOST = 0.95
_BISECTIONS = 10
_CLOSE = 5
"""A bisection ends within this part of the tolerance."""
_SHIFTS = 3


class TargetMissedError(InputError):
    """No schedule comes near the wanted share of the MACs."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The best schedule of a search.

    Attributes:
        levels: fraction of the atoms to skip in every block.
        loss: its loss.
        macs: the fraction of the dense MACs that it reaches.
        history: best loss after every generation, among those that reach the target.
        evaluations: schedules that were tried.
    """

    levels: tuple[float, ...]
    loss: float
    macs: float
    history: tuple[float, ...]
    evaluations: int


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
    """The schedule with the lowest loss at `target_macs`.

    Tournaments, crossover between two parents, Gaussian mutation; the best ones are always kept. A child that
    misses the target is moved towards it. Those that reach it are ranked by their loss, the others after them
    by their distance. The target is an upper bound: more operations would make a schedule look better.

    Args:
        evaluate: for instance `ScheduleObjective`.
        num_blocks: L.
        target_macs: fraction of the dense network's MACs.
        start: schedules that are tried first, beside uniform, rising and falling ones and one in which the
            first and the last block compute everything.
        protected: blocks that compute all atoms and are no part of the search.
        population, generations: size of the search.
        tolerance: a schedule reaches the target with `target_macs - tolerance` to `target_macs`.
        seed: of all random choices.
        after_try: called for every member of every generation, population * (generations + 1) times
            or some more.

    Raises:
        InputError: the settings leave nothing to search.
        TargetMissedError: no schedule reached the target.
    """
    open_blocks = _open_blocks(num_blocks, target_macs, protected)
    if population < 4 or generations < 1:
        raise InputError("the search needs a population of at least 4 and at least 1 generation")
    rng = np.random.default_rng(seed)
    search = _Search(evaluate, num_blocks, open_blocks, target_macs, tolerance, rng, after_try)
    people = search.first(start, population)
    history = [search.best(people).shown_loss]
    for _ in range(generations):
        people = search.next_generation(people, population)
        history.append(search.best(people).shown_loss)
    best = search.best(people)
    _check_reached(best, target_macs, tolerance)
    return Schedule(best.levels, best.loss, best.macs, tuple(history), search.evaluations)


def uniform_schedule(
    evaluate: Evaluate,
    num_blocks: int,
    target_macs: float,
    *,
    protected: Sequence[int] = (),
    tolerance: float = 0.02,
) -> Schedule:
    """The same level in every block that is not protected: the baseline of `search_schedule`.

    Found by bisection, since the MACs fall with the level. Arguments and errors as there.
    """
    open_blocks = _open_blocks(num_blocks, target_macs, protected)
    low, high, tried = 0.0, _MOST, dict[float, _Individual]()
    for _ in range(_BISECTIONS):
        level = round((low + high) / 2, 3)
        levels = tuple(level if block in open_blocks else 0.0 for block in range(num_blocks))
        loss, macs = evaluate(levels)
        tried[level] = _Individual(levels, loss, macs, _miss(macs, target_macs, tolerance))
        if 0 <= target_macs - macs < tolerance / _CLOSE:
            break
        if macs > target_macs:
            low = level
        else:
            high = level
    best = min(tried.values(), key=lambda person: (person.miss, target_macs - person.macs))
    _check_reached(best, target_macs, tolerance)
    return Schedule(best.levels, best.loss, best.macs, (best.loss,), len(tried))


def _open_blocks(num_blocks: int, target_macs: float, protected: Sequence[int]) -> list[int]:
    open_blocks = [block for block in range(num_blocks) if block not in protected]
    if not open_blocks:
        raise InputError(f"all of the {num_blocks} blocks are protected: there is nothing to search")
    if not 0 < target_macs < 1:
        raise InputError(f"target_macs is {target_macs}: give a fraction between 0 and 1")
    return open_blocks


def _miss(macs: float, target_macs: float, tolerance: float) -> float:
    """How far from the allowed range."""
    return max(macs - target_macs, target_macs - tolerance - macs, 0.0)


def _check_reached(best: "_Individual", target_macs: float, tolerance: float) -> None:
    if best.miss > 0:
        raise TargetMissedError(
            f"no schedule came within {target_macs - tolerance:.3g} to {target_macs:.3g} of the MACs "
            f"(nearest: {best.macs:.3f}): choose another target or a larger tolerance, protect fewer blocks "
            "or search longer"
        )


@dataclasses.dataclass(frozen=True)
class _Individual:
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


class _Search:
    def __init__(
        self,
        evaluate: Evaluate,
        num_blocks: int,
        open_blocks: list[int],
        target: float,
        tolerance: float,
        rng: np.random.Generator,
        after_try: Callable[[], None] | None,
    ) -> None:
        self.evaluate, self.num_blocks, self.open = evaluate, num_blocks, open_blocks
        self.target, self.tolerance, self.rng, self.after_try = target, tolerance, rng, after_try
        self.known: dict[tuple[float, ...], _Individual] = {}

    @property
    def evaluations(self) -> int:
        return len(self.known)

    def first(self, given: Sequence[Sequence[float]], population: int) -> list[_Individual]:
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
        aim = self.target - self.tolerance / 2
        found = self.individual(genes)
        for _ in range(_SHIFTS):
            if found.miss == 0:
                break
            # Each level removes about its share of the MACs of one block.
            saved = 1 - found.macs
            shift = (found.macs - aim) * self.num_blocks / len(self.open)
            if saved > 0.02:
                shift = float(self.genes(found).mean()) * ((1 - aim) / saved - 1)
            again = self.individual(self.genes(found) + shift)
            if again.miss >= found.miss:
                break
            found = again
        if self.after_try is not None:
            self.after_try()
        return found

    def individual(self, genes: np.ndarray) -> _Individual:
        levels = [0.0] * self.num_blocks
        for block, gene in zip(self.open, genes, strict=True):
            levels[block] = round(float(np.clip(gene, 0.0, _MOST)), 3)
        key = tuple(levels)
        if key not in self.known:
            loss, macs = self.evaluate(key)
            loss = loss if np.isfinite(loss) else float("inf")
            self.known[key] = _Individual(key, loss, macs, _miss(macs, self.target, self.tolerance))
        return self.known[key]

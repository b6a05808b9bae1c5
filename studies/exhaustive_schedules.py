"""Search of a router's schedule without savings, the measure of those of `pruning.routing.search_schedule`.

Every schedule runs on all structures, from the first block on; one that misses its share of the operations is
moved and runs again, up to three times.
"""

from collections.abc import Sequence

import numpy as np

from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.routing import BaseRouter, RoutedModel, Schedule, ScheduleObjective

MOST = 0.95
SHIFTS = 3

Rank = tuple[float, float]
"""Distance from the allowed share of the operations, and loss (eV)."""


class ExhaustiveSearch:
    """Genetic search of the levels of all blocks: tournaments, crossover, mutation, the best ones kept.

    Args:
        objective: network, structures and router.
        num_blocks: number of blocks.
        target: share of the dense MACs that is to stay, the upper bound.
        tolerance: how far below it a schedule may end.
        population: schedules per generation.
        generations: number of generations after the first.
        seed: random seed.

    Attributes:
        tried: levels -> rank and share of the MACs.
        passes: work so far, in passes of the dense network over one structure (`pruning.cost.work`).
    """

    def __init__(
        self,
        objective: ScheduleObjective,
        num_blocks: int,
        target: float,
        tolerance: float = 0.02,
        population: int = 16,
        generations: int = 10,
        seed: int = 0,
    ) -> None:
        self.objective, self.num_blocks, self.target, self.tolerance = (
            objective,
            num_blocks,
            target,
            tolerance,
        )
        self.population, self.generations = population, generations
        self.rng = np.random.default_rng(seed)
        self.tried: dict[tuple[float, ...], tuple[Rank, float]] = {}
        self.passes = 0.0

    def run(self) -> Schedule:
        """Search to the end.

        Returns:
            The best schedule.
        """
        n, share, ramp = self.num_blocks, 1 - self.target, np.linspace(-1.0, 1.0, self.num_blocks)
        shapes = [np.full(n, share), share * (1 + 0.5 * ramp), share * (1 - 0.5 * ramp)]
        if n > 2:
            shapes.append(np.minimum(MOST, np.array([0.0, *[share * n / (n - 2)] * (n - 2), 0.0])))
        while len(shapes) < self.population:
            shapes.append(share + 0.3 * self.rng.standard_normal(n))
        people = [self.try_near(shape) for shape in shapes]
        history = [self._best(people)]
        for _ in range(self.generations):
            children = [self._child(people) for _ in range(self.population)]
            people = sorted({*people, *children}, key=self._rank)[: self.population]
            history.append(self._best(people))
        best = history[-1]
        (_, loss), macs = self.tried[best]
        losses = tuple(self._rank(levels)[1] for levels in history)
        return Schedule(best, loss, macs, losses, len(self.tried), self.passes)

    def try_near(self, genes: np.ndarray) -> tuple[float, ...]:
        """Measure a schedule, and again after shifts towards the middle of the allowed range."""
        aim, levels = self.target - self.tolerance / 2, self._measured(genes)
        for _ in range(SHIFTS):
            (miss, _), macs = self.tried[levels]
            if miss == 0:
                break
            shift = macs - aim
            if 1 - macs > 0.02:
                shift = float(np.mean(levels)) * ((1 - aim) / (1 - macs) - 1)
            again = self._measured(np.array(levels) + shift)
            if self._rank(again)[0] >= miss:
                break
            levels = again
        return levels

    def _measured(self, genes: np.ndarray) -> tuple[float, ...]:
        levels = tuple(round(float(gene), 3) for gene in np.clip(genes, 0.0, MOST))
        if levels not in self.tried:
            calibration: Calibration = self.objective.calibration
            router: BaseRouter = self.objective.make_router(levels)
            routed = RoutedModel(self.objective.model, router)
            loss, macs = calibration.loss(routed), routed.computed_shares().macs
            miss = max(macs - self.target, self.target - self.tolerance - macs, 0.0)
            self.tried[levels] = (miss, loss), macs
            self.passes += macs * len(calibration.structures)
        return levels

    def _child(self, people: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        n = self.num_blocks
        mother, father = np.array(self._winner(people)), np.array(self._winner(people))
        weight = self.rng.uniform(-0.25, 1.25, n)
        mutated = self.rng.random(n) < max(0.3, 1 / n)
        genes = weight * mother + (1 - weight) * father
        return self.try_near(genes + 0.1 * mutated * self.rng.standard_normal(n))

    def _winner(self, people: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return self._best([people[i] for i in self.rng.integers(len(people), size=3)])

    def _best(self, people: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return min(people, key=self._rank)

    def _rank(self, levels: tuple[float, ...]) -> Rank:
        return self.tried[levels][0]

"""Search for a router by the name of a method: schedule, training, thresholds."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.fingerprints import fingerprint_of_structures
from equiformer2.pruning.routing.active_region import ActiveRegion
from equiformer2.pruning.routing.ftp import FTPRouter
from equiformer2.pruning.routing.ftp_training import RouterLosses, RouterTraining, train_router
from equiformer2.pruning.routing.geometric_routers import (
    DegreeRouter,
    DistanceRouter,
    RandomRouter,
    StaticRouter,
)
from equiformer2.pruning.routing.router import BaseRouter, ScoreRouter
from equiformer2.pruning.routing.router_state import RoutingState
from equiformer2.pruning.routing.schedule_objective import ScheduleObjective
from equiformer2.pruning.routing.score_selection import check_mode
from equiformer2.pruning.routing.sparsity_schedule import (
    Objective,
    Schedule,
    search_schedule,
    uniform_schedule,
)
from equiformer2.pruning.routing.thresholds import with_thresholds
from equiformer2.pruning.routing.zero_tprune import AtomPruner, EdgePruner

log = logging.getLogger("equiformer2")

CONTEXT_ONLY = "context_only"
UNIFORM = "uniform"
"""FTP's fixed order of the atoms with the same level in every block: the baseline of searched schedules."""
IMPORTANCE = "atom_importance"
"""`atom` without its similarity stage."""
ROUTING_METHODS = (
    *("static", "ftp", "atom", IMPORTANCE, "edge"),
    *(CONTEXT_ONLY, UNIFORM, "distance", "degree", "random"),
)
_BY_ATTENTION = ("atom", IMPORTANCE, "edge")
"""They compute all of the first block, before which there is no attention."""

MakeRouter = Callable[[Sequence[float | None]], ScoreRouter]


@dataclasses.dataclass(frozen=True)
class RoutingSettings:
    """Settings of the search for a router.

    Attributes:
        mode: `topk`, `threshold` or `smooth`. Schedules are searched as budgets (topk) and turned into
            thresholds at the end; the `ftp` router is trained and searched in its mode.
        width: width of the gates of `smooth`, in units of the score.
        keep_free: always compute free atoms and the adsorbate.
        protected: blocks that compute all atoms; the search decides for the others.
        population: schedules per generation of the genetic search.
        generations: number of its generations.
        tolerance: share of the MACs by which a schedule may end below the target.
        steps: training steps of `ftp`.
        learning_rate: learning rate of that training.

    Raises:
        InputError: an unknown mode, or a width that is not positive.
    """

    mode: str = "topk"
    width: float = 0.1
    keep_free: bool = False
    protected: tuple[int, ...] = ()
    population: int = 16
    generations: int = 8
    tolerance: float = 0.02
    steps: int = 200
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        check_mode(self.mode, self.width)


def find_router(
    method: str,
    model: EquiformerV2,
    calibration: Calibration,
    target_macs: float | None,
    settings: RoutingSettings | None = None,
    *,
    seed: int = 0,
    state_path: AnyPath | None = None,
    progress: bool = True,
) -> tuple[BaseRouter, dict[str, Any]]:
    """Find a router that leaves about a given share of the MACs.

    Args:
        method: name of the method, of `ROUTING_METHODS`.
        model: the network, in evaluation mode; it is not changed.
        calibration: structures with its dense answers; labels are not read.
        target_macs: share of the dense network's MACs that is to stay; None for `context_only`, which has no
            budget.
        settings: settings of the search; None for the defaults.
        seed: random seed of the search, of the training and of random routers.
        state_path: file of the search's and the training's state, from which they continue; None keeps none.
        progress: show progress bars.

    Returns:
        The router, and a record of the search for JSON (schedules, losses of the training).

    Raises:
        InputError: an unknown method, settings that leave nothing to search, a state of another router.
        TargetMissedError: no schedule comes near the target.
    """
    state_path = None if state_path is None else Path(state_path)
    settings = settings or RoutingSettings()
    if method not in ROUTING_METHODS:
        raise InputError(f"the method {method!r} is not known: use one of {', '.join(ROUTING_METHODS)}")
    if method == CONTEXT_ONLY:
        if target_macs is not None:
            raise InputError("context_only has no budget, the structures decide: leave the target out")
        return ActiveRegion(CONTEXT_ONLY), {}
    if target_macs is None:
        raise InputError(f"the method {method!r} needs a target: give a share of the MACs, such as macs=0.7")
    fingerprint = {
        "model": fingerprint_of_weights(model),
        "structures": fingerprint_of_structures(calibration.structures),
        "batches": [batch.num_graphs for batch in calibration.batches],
        "method": method,
        "target": target_macs,
        "seed": seed,
        "force_weight": calibration.force_weight,
        "settings": dataclasses.asdict(settings),
    }
    state = RoutingState(state_path, fingerprint)
    search = _RouterSearch(model, calibration, target_macs, settings, seed, state, progress)
    try:
        return search.ftp() if method == "ftp" else search.untrained(method)
    finally:
        state.save()


class _RouterSearch:
    """Stages of the search for one router: schedules of routers, and the training of `ftp`."""

    def __init__(
        self,
        model: EquiformerV2,
        calibration: Calibration,
        target: float,
        settings: RoutingSettings,
        seed: int,
        state: RoutingState,
        progress: bool,
    ) -> None:
        last = len(model.blocks) - 1
        wrong = [block for block in settings.protected if not 0 <= block <= last]
        if wrong:
            raise InputError(f"block {wrong[0]} cannot be protected: the network has blocks 0 to {last}")
        self.protected = set(settings.protected)
        self.model, self.calibration, self.target, self.settings = model, calibration, target, settings
        self.seed, self.state, self.progress = seed, state, progress

    def untrained(self, method: str) -> tuple[BaseRouter, dict[str, Any]]:
        """A router without training."""
        if method in _BY_ATTENTION:
            self.protected.add(0)
        make = self.maker(method)
        schedule = self.uniform(make) if method == UNIFORM else self.search("schedule", make)
        return self.in_mode(make(self.levels(schedule.levels))), {"schedule": schedule.to_dict()}

    def in_mode(self, router: ScoreRouter) -> ScoreRouter:
        """A router of budgets, in the mode of the settings."""
        if self.settings.mode != "topk":
            batches, settings = self.calibration.batches, self.settings
            router = with_thresholds(router, self.model, batches, settings.mode, width=settings.width)
        return router

    def ftp(self) -> tuple[BaseRouter, dict[str, Any]]:
        """FTP's three stages: schedule of the static router, training at it, schedule of the trained one.

        A training that ends further from the dense network than the static router was gives that router.
        """
        settings = self.settings
        first = self.search("static schedule", self.maker("static"))
        router = FTPRouter(
            self.levels(first.levels),
            mode=settings.mode,
            width=settings.width,
            keep_free=settings.keep_free,
            seed=self.seed,
        )
        losses = self.train(router)
        schedule = self.search("schedule", router.with_levels, [first.levels])
        record = {
            "static_schedule": first.to_dict(),
            "training": [dataclasses.asdict(losses[step]) for step in (0, -1)],
            "schedule": schedule.to_dict(),
            "kept": "trained" if schedule.loss <= first.loss else "static",
        }
        if schedule.loss > first.loss:
            log.warning(
                f"the trained router (loss {schedule.loss:.4f}) is worse than the static one it began with "
                f"({first.loss:.4f}): the static one is kept; train for more steps or on more structures"
            )
            return self.in_mode(self.maker("static")(self.levels(first.levels))), record
        return router.with_levels(self.levels(schedule.levels)), record

    def maker(self, method: str) -> MakeRouter:
        """Function from levels to the router of budgets that a schedule is searched for."""
        options: dict[str, Any] = {"keep_free": self.settings.keep_free}
        kinds: dict[str, type[ScoreRouter]] = {
            "static": StaticRouter,
            UNIFORM: StaticRouter,
            "distance": DistanceRouter,
            "degree": DegreeRouter,
            "random": RandomRouter,
            "atom": AtomPruner,
            IMPORTANCE: AtomPruner,
            "edge": EdgePruner,
        }
        if method == "random":
            options["seed"] = self.seed
        if method == IMPORTANCE:
            options["similar"] = 0.0
        if method in ("atom", IMPORTANCE):
            heads = {block.ga.num_heads for block in self.model.blocks if block.ga is not None}  # type: ignore[union-attr]
            if len(heads) > 1:
                log.info("blocks have different numbers of heads: all heads count for the atoms' importance")
            else:
                filtered = AtomPruner(0.5).with_head_filter(self.model, self.calibration.batches)
                options["heads"] = filtered.heads
        return lambda levels: kinds[method](levels, **options)

    def search(self, stage: str, make: MakeRouter, start: Sequence[Sequence[float]] = ()) -> Schedule:
        """A schedule by genetic search."""
        settings = self.settings
        with tqdm(total=100, desc=stage, unit="%", disable=not self.progress) as bar:

            def show(done: float, loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(round(100 * done, 1) - bar.n)

            return search_schedule(
                self.objective(stage, make),
                len(self.model.blocks),
                self.target,
                start=start,
                protected=sorted(self.protected),
                population=settings.population,
                generations=settings.generations,
                tolerance=settings.tolerance,
                seed=self.seed,
                progress=show,
            )

    def uniform(self, make: MakeRouter) -> Schedule:
        """The schedule with the same level everywhere."""
        return uniform_schedule(
            self.objective("schedule", make),
            len(self.model.blocks),
            self.target,
            protected=sorted(self.protected),
            tolerance=self.settings.tolerance,
        )

    def objective(self, stage: str, make: MakeRouter) -> Objective:
        """Loss and MACs of a schedule, looked up if it was tried before the search was interrupted."""
        objective = ScheduleObjective(self.model, self.calibration, lambda levels: make(self.levels(levels)))
        return self.state.remembered(stage, objective)

    @staticmethod
    def levels(levels: Sequence[float]) -> list[float | None]:
        """Levels of a router; None for blocks that skip nothing and need no scores."""
        return [level if level > 0 else None for level in levels]

    def train(self, router: FTPRouter) -> list[RouterLosses]:
        """Train the router's MLP in place."""
        settings = RouterTraining(
            steps=self.settings.steps, learning_rate=self.settings.learning_rate, seed=self.seed
        )
        resume = self.state.training
        done = 0 if resume is None else len(resume["history"])
        with tqdm(
            total=settings.steps, initial=done, desc="training", unit="steps", disable=not self.progress
        ) as bar:

            def show(step: int, losses: RouterLosses) -> None:
                bar.set_postfix(
                    forces=f"{losses.forces:.3g}", sparsity=f"{losses.sparsity:.2g}", refresh=False
                )
                bar.update()

            return train_router(
                self.model,
                router,
                self.calibration.batches,
                settings,
                after_step=show,
                resume=resume,
                keep=self.state.keep_training,
            )

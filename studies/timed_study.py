"""A study with further plans: for operations and time of a force call, and of whole branches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch_geometric.data import Batch
from tqdm import tqdm

from equiformer2.pruning.analysis.pareto import STUDIED, Study, StudySettings, result_name
from equiformer2.pruning.cost.targets import LatencyTarget, MacTarget, Target
from equiformer2.pruning.structured.plan import PruningPlan
from studies import branch_plans

TIMED = "multi_time"


@dataclass(frozen=True)
class TimedSettings(StudySettings):
    """Settings of a study that also knows `multi_time`, `block_filled` and `cosine_filled`.

    Attributes:
        latency: share of the time of a force call that `multi_time` leaves.
        threads: number of threads with which its times are measured; None for those that torch has.
    """

    known_methods: ClassVar[tuple[str, ...]] = (*STUDIED, TIMED, *branch_plans.METHODS)

    latency: float = 0.6
    threads: int | None = None


class TimedStudy(Study):
    """`Study` with plans of `multi_time` and of whole branches (`studies.branch_plans`).

    Attributes:
        latency_target: class of the target that measures times of force calls.
    """

    latency_target: ClassVar[type[LatencyTarget]] = LatencyTarget
    settings: TimedSettings

    def search_for_time(self, progress: bool = True) -> None:
        """Make the plans of `TIMED` and nothing else: before `run`, when the machine does nothing else."""
        jobs = [(keep, seed) for keep in self.settings.keep for seed in self.settings.seeds]
        for keep, seed in tqdm(jobs, desc="plans for time", unit="plans", disable=not progress):
            if not (self.out / "results" / f"{result_name(TIMED, keep, seed)}.json").exists():
                self._search(TIMED, keep, seed)

    def _search(self, method: str, keep: float, seed: int) -> tuple[PruningPlan, dict[str, Any]]:
        if method in branch_plans.METHODS:
            return self._branches(method, keep, seed)
        if method != TIMED:
            return super()._search(method, keep, seed)
        # Times are of the first held-out structure, in a file that all seeds share.
        batch = Batch.from_data_list(self.held_out[0].calibration.structures[:1])
        path, settings = self.searches / "times.json", self.settings
        targets: Sequence[Target] = (
            MacTarget(self.model.config, keep, *self._calibration(seed).size),
            self.latency_target(self.model, batch, settings.latency, path, settings.threads),
        )
        return self._find_plan("multi", targets, result_name(TIMED, keep, seed), seed)

    def _branches(self, method: str, keep: float, seed: int) -> tuple[PruningPlan, dict[str, Any]]:
        calibration = self._calibration(seed)
        share = MacTarget(self.model.config, keep, *calibration.size).fraction_of
        if method == branch_plans.COSINE:
            return branch_plans.cosine_plan(self.model, calibration, share, keep)

        def find(higher: float) -> tuple[PruningPlan, dict[str, Any]]:
            return self._search("block", higher, seed)

        return branch_plans.block_plan(self.model, find, share, keep)

    def _later_options(self) -> dict[str, Any]:
        options = super()._later_options()
        if TIMED in self.settings.methods:
            options["timing"] = {"latency": self.settings.latency, "threads": self.settings.threads}
        return options

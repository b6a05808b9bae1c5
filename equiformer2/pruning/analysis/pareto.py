"""Comparison of pruning methods on held-out systems: methods times budgets times seeds, one file per result.

A stored result is not computed again, so a study can be killed, continued and extended. Errors against
the dense network and against labels are kept apart, and so are held-out sets of different labels.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Normalizers, load_checkpoint, save_checkpoint
from equiformer2.checkpoint.compact import check_not_stored
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.checkpoint.training_data import inherited
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration import Calibration, Network
from equiformer2.pruning.calibration_data import labelled_energies, mixed_systems, read_structures
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.cost.targets import CombinedTarget, MacTarget, ParameterTarget, Target
from equiformer2.pruning.fingerprints import fingerprint_of_structures
from equiformer2.pruning.recovery.distillation import RUN, Paths, distill
from equiformer2.pruning.routing import (
    ROUTING_METHODS,
    RoutedModel,
    RoutingSettings,
    TargetMissedError,
    find_router,
)
from equiformer2.pruning.routing.router_files import router_to_dict
from equiformer2.pruning.routing.router_search import CONTEXT_ONLY
from equiformer2.pruning.structured.apply import shrink
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_methods import METHODS, find_plan


@dataclass(frozen=True)
class HeldOut:
    """Structures with the dense network's answers and their own labels.

    Labels of one source only: DFT and a universal potential do not go into one number, so each has a
    `HeldOut` of its own.

    Attributes:
        name: name of the set, such as `dft`.
        calibration: the structures and the dense answers.
        labels: labels per batch, in normalised units, NaN for structures without; fields that all of a batch
            lack are absent.
    """

    name: str
    calibration: Calibration
    labels: list[dict[str, Tensor]]

    @classmethod
    def read(
        cls,
        name: str,
        paths: str | Path | Sequence[str | Path],
        model: EquiformerV2,
        normalizers: Normalizers,
        energy_kind: str,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> "HeldOut":
        """Read a held-out set from files.

        Args:
            name: name of the set.
            paths: files, as in `read_structures`.
            model: dense network.
            normalizers: units of its outputs.
            energy_kind: kind of energy that it predicts; stored energies of another kind are no labels.
            limit: maximum number of structures; None for all.
            batch_size: structures per forward pass.

        Returns:
            The set.

        Raises:
            InputError: there are no structures, or one that the network cannot take.
            datasets_oc20.DataError: a file cannot be read.
        """
        structures = read_structures(paths, limit)
        calibration = Calibration(model, normalizers, structures, batch_size)
        energies = labelled_energies(paths, energy_kind)
        labels = []
        for number, batch in enumerate(calibration.batches):
            part = structures[number * batch_size : (number + 1) * batch_size]
            fields: dict[str, Tensor] = {}
            if energies and any("energy" in one for one in part):
                values = torch.cat([one.get("energy", torch.full((1,), torch.nan)).view(-1) for one in part])
                fields["energy"] = normalizers.normalize_energy(values.to(batch.pos.device), batch)
            if any("forces" in one for one in part):
                values = torch.cat([one.get("forces", one.pos * torch.nan) for one in part])
                fields["forces"] = normalizers.normalize_forces(values.to(batch.pos.device))
            labels.append(fields)
        return cls(name, calibration, labels)

    @property
    def systems(self) -> tuple[str, ...]:
        """Names of the systems."""
        return self.calibration.systems

    def errors(self, network: Network) -> dict[str, Any]:
        """Measure a network.

        Args:
            network: called as `network(batch, graph=…)`.

        Returns:
            `to_dense` and `to_labels` (None without labels), each with averages over systems
            (`Discrepancy.averages`).
        """
        answers = self.calibration.answers(network)
        errors: dict[str, Any] = {"to_dense": self.calibration.compare(answers).averages(), "to_labels": None}
        if any(self.labels):
            errors["to_labels"] = self.calibration.compare(answers, self.labels).averages()
        return errors

    def check_unseen(self, used: Sequence[Data], purpose: str) -> None:
        """Refuse structures of systems that are held out.

        Args:
            used: structures that methods may see.
            purpose: use of these structures, for errors.

        Raises:
            InputError: a system is in both.
        """
        both = sorted({structure.sid for structure in used} & set(self.systems))
        if both:
            raise InputError(
                f"the system {both[0]} is in {purpose} and in the held-out set {self.name}: hold out others"
            )


PREFIX = "route_"
ROUTED = tuple(PREFIX + name for name in ROUTING_METHODS)
NO_BUDGET = PREFIX + CONTEXT_ONLY
"""Its cost is decided by the structures: one result for all budgets and seeds."""


def routed_result(
    method: str,
    keep: float,
    seed: int,
    model: EquiformerV2,
    calibration: Calibration,
    held_out: list[HeldOut],
    settings: RoutingSettings,
    state_path: Path,
    repeats: int,
) -> dict[str, Any]:
    """Make one router and measure it on all held-out sets.

    Args:
        method: name of the method, of `ROUTED`.
        keep: share of the MACs that is to stay.
        seed: random seed.
        model: dense network.
        calibration: structures with its answers.
        held_out: held-out sets; the first structure of the first set is timed.
        settings: settings of the search for a router.
        state_path: file of the search's state, from which it continues.
        repeats: number of timed pairs of calls.

    Returns:
        The record of the router, in the form of `Study`. `macs` is the share on the calibration structures;
        `macs_on` has it for each held-out set, where it differs. `missed`, the reason, stands in place of
        results where no schedule comes near `keep`.
    """
    record: dict[str, Any] = {"method": method, "keep": keep, "seed": seed}
    try:
        router, search = find_router(
            method.removeprefix(PREFIX),
            model,
            calibration,
            None if method == NO_BUDGET else keep,
            settings,
            seed=seed,
            state_path=state_path,
            progress=False,
        )
    except TargetMissedError as error:
        return record | {"missed": str(error)}
    routed = RoutedModel(model, router)
    loss = calibration.loss(routed)
    achieved = {"calibration": routed.computed_shares()}
    errors = {}
    for part in held_out:
        routed = RoutedModel(model, router)
        errors[part.name] = part.errors(routed)
        achieved[part.name] = routed.computed_shares()
    batch = Batch.from_data_list(held_out[0].calibration.structures[:1])
    ready = deepcopy(model).requires_grad_(False)
    ready.fold_weights()
    latency = compare_latency(lambda: router(ready, batch), lambda: ready(batch), repeats)
    return record | {
        "macs": achieved["calibration"].macs,
        "macs_on": {part.name: achieved[part.name].macs for part in held_out},
        "parameters": 1.0,
        "latency": latency.to_dict(),
        "search": search,
        "router": router_to_dict(router),
        "achieved": {name: counts.to_dict() for name, counts in achieved.items()},
        "calibration_loss": loss,
        "cut": errors,
        "distilled": None,
    }


log = logging.getLogger("equiformer2")

DENSE, SCRATCH = "dense", "scratch"
STUDIED = (*METHODS, *ROUTED)
_ANY = 0.5  # a target's fraction, where only its count is used


@dataclass(frozen=True)
class Recovery:
    """Settings for the distillation of every pruned network.

    Attributes:
        train: training structures, as in `distill`.
        val: validation structures, as in `distill`.
        arguments: arguments of `equiformer2 train`.
        scratch: also train the plans of the method `multi` from random weights, equally long.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    scratch: bool = False


@dataclass(frozen=True)
class StudySettings:
    """Methods, budgets and seeds to compare, and the settings of each result.

    Attributes:
        methods: names of methods, of `known_methods`: plans (`METHODS`) and routers (`ROUTED`).
        keep: shares of the multiply-accumulates that stay.
        seeds: random seeds, also of the choice of calibration structures.
        structures: number of calibration structures per seed.
        tries: number of cuts tried per step of a search.
        repeats: pairs of calls per measured latency.
        routing: settings of the search for routers.
        known_methods: names that `methods` may hold.

    Raises:
        InputError: an unknown method, or a number out of its range.
    """

    known_methods: ClassVar[tuple[str, ...]] = STUDIED

    methods: tuple[str, ...]
    keep: tuple[float, ...]
    seeds: tuple[int, ...]
    structures: int = 32
    tries: int = 8
    repeats: int = 10
    routing: RoutingSettings = field(default_factory=RoutingSettings)

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in self.known_methods]
        if unknown:
            known = ", ".join(self.known_methods)
            raise InputError(f"the method {unknown[0]!r} is not known: use some of {known}")
        for name in ("structures", "tries", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give at least 1")
        if not all(0 < share < 1 for share in self.keep):
            raise InputError(f"keep is {list(self.keep)}: give shares between 0 and 1")


class Study:
    """Comparison of methods on one network, kept in a folder, so that it can be interrupted and extended.

    Args:
        path: checkpoint of the dense network.
        calibration: data to calibrate on, as in `read_structures`.
        held_out: name -> data to test on; no system of the calibration (or distillation) data may be in them.
        settings: methods, budgets and seeds.
        out: folder of the study.
        recovery: distillation of every network; None for the networks as they are cut.
        limit: maximum number of structures per held-out set.
        searches: folder of the searches' states that studies of one network share; None for one in `out`.

    Raises:
        InputError: a system is on both sides, or `out` holds a study of something else.
    """

    def __init__(
        self,
        path: str | Path,
        calibration: Paths,
        held_out: Mapping[str, Paths],
        settings: StudySettings,
        out: AnyPath,
        recovery: Recovery | None = None,
        limit: int | None = None,
        searches: AnyPath | None = None,
    ) -> None:
        out = Path(out)
        searches = None if searches is None else Path(searches)
        self.path, self.checkpoint = path, load_checkpoint(path)
        check_not_stored(self.checkpoint.model, path)
        self.model = self.checkpoint.model.eval()
        self.calibration_data, self.settings, self.out, self.recovery = calibration, settings, out, recovery
        self.searches = out / "searches" if searches is None else searches
        self.held_out = [
            HeldOut.read(
                name, data, self.model, self.checkpoint.normalizers, self.checkpoint.energy_kind, limit
            )
            for name, data in held_out.items()
        ]
        for part in self.held_out:
            for seed in settings.seeds:
                part.check_unseen(self._structures(seed), "the calibration data")
            if recovery is not None:
                part.check_unseen(read_structures(recovery.train), "the data to distill on")
        self._check_same_study()
        self._calibrations: dict[int, Calibration] = {}

    def run(self, progress: bool = True) -> list[dict[str, Any]]:
        """Compute the missing results.

        Args:
            progress: show a progress bar.

        Returns:
            All results in a fixed sequence.
        """
        planned = planned_results(self.settings, self.recovery is not None and self.recovery.scratch)
        results = []
        for name, job in tqdm(planned.items(), desc="study", unit="results", disable=not progress):
            path = self.out / "results" / f"{name}.json"
            if not path.exists():
                record = self._result(*job)
                if not _is_finite(record):
                    reason = "the network breaks down: its answers are not finite"
                    record = dict(zip(("method", "keep", "seed"), job, strict=True)) | {"missed": reason}
                write_json(path, record, make_folder=True)
            results.append(read_json(path))
        return results

    def _result(self, method: str, keep: float, seed: int) -> dict[str, Any]:
        name, search = result_name(method, keep, seed), dict[str, Any]()
        calibration = self._calibration(seed)
        if method in ROUTED:
            return routed_result(
                method,
                keep,
                seed,
                self.model,
                calibration,
                self.held_out,
                self.settings.routing,
                self.searches / f"{name}.pt",
                self.settings.repeats,
            )
        macs = MacTarget(self.model.config, _ANY, *calibration.size)
        if method == DENSE:
            plan = PruningPlan.keep_all(self.model.config)
        elif method == SCRATCH:
            plan = self._searched_plan(keep, seed)
        else:
            plan, search = self._search(method, keep, seed)
        small = shrink(self.model, plan)
        record: dict[str, Any] = {
            "method": method,
            "keep": keep,
            "seed": seed,
            "macs": macs.fraction_of(plan),
            "parameters": ParameterTarget(self.model.config, _ANY).fraction_of(plan),
            "latency": self._latency(small),
            "search": search,
            "plan": plan.to_dict(),
            "cut": None,
            "distilled": None,
        }
        if method != SCRATCH:
            record["calibration_loss"] = calibration.loss(small)
            record["cut"] = self._errors(small)
        if self.recovery is not None and method != DENSE:
            record["distilled"] = self._errors(self._distilled(name, small, method == SCRATCH, seed))
        return record

    def _search(self, method: str, keep: float, seed: int) -> tuple[PruningPlan, dict[str, Any]]:
        """The plan of a method and the record of its search; a search that was stopped goes on."""
        target = MacTarget(self.model.config, keep, *self._calibration(seed).size)
        return self._find_plan(method, [target], result_name(method, keep, seed), seed)

    def _find_plan(
        self, method: str, targets: Sequence[Target], name: str, seed: int
    ) -> tuple[PruningPlan, dict[str, Any]]:
        """A plan that reaches all targets; the state of the search is kept under `name`."""
        combined = CombinedTarget(targets)
        return find_plan(
            method,
            self.model,
            self.checkpoint.normalizers,
            self._calibration(seed),
            combined.cost,
            combined.target,
            shares=combined.shares,
            seed=seed,
            tries=self.settings.tries,
            state_path=self.searches / f"{name}.json",
            progress=False,
        )

    def _searched_plan(self, keep: float, seed: int) -> PruningPlan:
        path = self.out / "results" / f"{result_name('multi', keep, seed)}.json"
        if not path.exists():
            raise InputError("training from scratch takes the plans of 'multi': add it to the methods")
        return PruningPlan.from_dict(read_json(path)["plan"], str(path))

    def _errors(self, network: EquiformerV2) -> dict[str, Any]:
        return {part.name: part.errors(network) for part in self.held_out}

    def _structures(self, seed: int) -> list[Any]:
        return mixed_systems(read_structures(self.calibration_data, self.settings.structures, seed), seed)

    def _calibration(self, seed: int) -> Calibration:
        if seed not in self._calibrations:
            # One at a time: the dense answers are kept in memory.
            self._calibrations = {
                seed: Calibration(self.model, self.checkpoint.normalizers, self._structures(seed))
            }
        return self._calibrations[seed]

    def _latency(self, small: EquiformerV2) -> dict[str, Any]:
        """Time of one forward pass for the first held-out structure, prepared as for inference."""
        batch = Batch.from_data_list(self.held_out[0].calibration.structures[:1])
        networks = [deepcopy(network).requires_grad_(False) for network in (small, self.model)]
        for network in networks:
            network.fold_weights()
        small_ready, dense_ready = networks
        return compare_latency(
            lambda: small_ready(batch), lambda: dense_ready(batch), self.settings.repeats
        ).to_dict()

    def _distilled(self, name: str, small: EquiformerV2, scratch: bool, seed: int) -> EquiformerV2:
        assert self.recovery is not None
        student = self.out / "students" / f"{name}.pt"
        student.parent.mkdir(parents=True, exist_ok=True)
        dense = self.checkpoint
        # Its weights count as those that they were taken from: averaged or raw.
        states = {"raw_state": None, "averaged_state": None, f"{dense.weights}_state": small.state_dict()}
        save_checkpoint(
            student,
            model=small,
            normalizers=dense.normalizers,
            energy_kind=dense.energy_kind,
            provenance={**inherited(dense.provenance), "pruned_from": dense.provenance, "study": name},
            **states,
        )
        run = distill(
            student,
            self.path,
            list(self.recovery.train),
            list(self.recovery.val),
            self.out / "distilled" / name,
            [*self.recovery.arguments, f"--seed={seed}"],
            from_scratch=scratch,
            labels=self.out / "labels",
        )
        assert run.name == RUN
        # The last weights, not the best: nothing is chosen by any error.
        return load_checkpoint(run / "checkpoints" / "last.pt").model.eval()

    def _later_options(self) -> dict[str, Any]:
        """Settings that only some methods use, by key in `study.json`, to which they may be added later."""
        routed = any(name in ROUTED for name in self.settings.methods)
        return {"routing": asdict(self.settings.routing)} if routed else {}

    def _check_same_study(self) -> None:
        # Methods, shares and seeds are not compared: a study may be extended.
        options = {name: getattr(self.settings, name) for name in ("structures", "tries", "repeats")}
        later, calibration = self._later_options(), self.calibration_data
        calibration = [calibration] if isinstance(calibration, str | Path) else calibration
        identity: dict[str, Any] = {
            "model": fingerprint_of_weights(self.model),
            "calibration": [str(path) for path in calibration],
            "held_out": {
                part.name: fingerprint_of_structures(part.calibration.structures) for part in self.held_out
            },
            "options": options,
            "recovery": None if self.recovery is None else asdict(self.recovery) | {"scratch": None},
        }
        identity = json.loads(json.dumps(identity | later))
        path = self.out / "study.json"
        if path.exists():
            known = read_json(path)
            # The first routers, say, of a study that had none.
            added = {name: identity[name] for name in later if name not in known}
            different = [key for key in identity if (known | added).get(key) != identity[key]]
            if different:
                raise InputError(f"{self.out} holds a study with other {different[0]}: name another folder")
            if added:
                write_json(path, known | added)
            return
        write_json(path, identity, make_folder=True)


def planned_results(settings: StudySettings, scratch: bool) -> dict[str, tuple[str, float, int]]:
    """List the results of a study.

    Args:
        settings: settings of the study.
        scratch: True if it also trains from random weights.

    Returns:
        Name of each result -> its method, share of the operations and seed.
    """
    jobs = [(DENSE, 1.0, 0)]
    methods = [name for name in settings.methods if name != NO_BUDGET]
    if NO_BUDGET in settings.methods:
        jobs.append((NO_BUDGET, 1.0, settings.seeds[0]))
    if scratch:
        methods.append(SCRATCH)
    for keep in settings.keep:
        jobs += [(method, keep, seed) for method in methods for seed in settings.seeds]
    return {result_name(*job): job for job in jobs}


def result_name(method: str, keep: float, seed: int) -> str:
    """Return the name of the file of a result, without its ending."""
    return DENSE if method == DENSE else f"{method}_{keep:g}_{seed}"


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
